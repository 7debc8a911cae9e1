"""The byte layout of packed codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_kvcache.kernels.pack import pack_bits
from hf_kvcache.kernels.reference.pack import unpack_bits
from tests.choosing import pairwise
from tests.kernels.bytes_by_hand import bytes_by_hand

BITS = [1, 2, 3, 4, 8]
DIMS = [8, 16, 64, 72, 80, 96, 128, 256]


def random_codes(bits: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits * 1000 + shape[-1])
    return torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_layout_is_the_documented_one(bits: int, dim: int) -> None:
    """Every byte is where python integers put it, and the size is exactly ``dim * bits / 8``."""
    codes = random_codes(bits, 3, dim)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, dim * bits // 8)
    assert [bytes(row.tolist()) for row in packed] == [bytes_by_hand(row.tolist(), bits) for row in codes]


def test_layout_of_rows_written_down() -> None:
    """The layout of a few rows worked out on paper; a change of it breaks saved pages."""
    row = torch.tensor([1, 2, 3, 0, 2, 1, 0, 3], dtype=torch.uint8)
    # Segments of two: byte 0 holds elements 0, 2, 4, 6 and byte 1 elements 1, 3, 5, 7, the first lowest.
    assert pack_bits(row, 2).tolist() == [0b00_10_11_01, 0b11_01_00_10]
    assert pack_bits(row, 4).tolist() == [0x21, 0x12, 0x03, 0x30]
    assert pack_bits(row & 1, 1).tolist() == [0b10100101]
    # Three bits: the plane of the two low bits, then the plane of the high bit.
    assert pack_bits(row + 4 * (row & 1), 3).tolist() == [0b00_10_11_01, 0b11_01_00_10, 0b10100101]


@pairwise("bits, dim, out_dtype", BITS, DIMS, [torch.uint8, torch.int32, torch.float32])
def test_round_trip(bits: int, dim: int, out_dtype: torch.dtype) -> None:
    """Unpacking gives the codes back, whatever was in the output before."""
    codes = random_codes(bits, 2, 5, dim)
    poison = float("nan") if out_dtype.is_floating_point else 113
    out = torch.full(codes.shape, poison, dtype=out_dtype)
    assert unpack_bits(pack_bits(codes, bits), bits, out) is out
    assert torch.equal(out, codes.to(out_dtype))


@pytest.mark.parametrize("bits", BITS)
def test_unpacks_a_strided_view(bits: int) -> None:
    """A field inside larger records is unpacked as it is, and into a strided output."""
    codes = random_codes(bits, 4, 64)
    packed = pack_bits(codes, bits)
    records = torch.full((8, 16 + packed.shape[-1] + 16), 255, dtype=torch.uint8)
    records[::2, 16 : 16 + packed.shape[-1]] = packed
    out = torch.full((4, 128), float("nan"))
    unpack_bits(records[::2, 16 : 16 + packed.shape[-1]], bits, out[:, 32:96])
    assert torch.equal(out[:, 32:96], codes.float())
    assert out[:, :32].isnan().all() and out[:, 96:].isnan().all()


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 33), st.data())
def test_any_codes_survive(bits: int, eighths: int, data: st.DataObject) -> None:
    """Any row of any multiple of eight survives the round trip and leaves its input as it was."""
    row = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=8 * eighths, max_size=8 * eighths))
    codes = torch.tensor(row, dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert bytes(packed.tolist()) == bytes_by_hand(row, bits)
    assert unpack_bits(packed, bits, torch.zeros(len(row), dtype=torch.int32)).tolist() == row
    assert codes.tolist() == row
