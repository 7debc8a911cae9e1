"""Bit packing and page decoding by Triton kernels against the layout by hand."""

from __future__ import annotations

import pytest
import torch

from hf_kvcache.kernels.page import PageLayout, SideFormat
from hf_kvcache.kernels.triton import pack
from tests.kernels.bytes_by_hand import bytes_by_hand
from tests.kernels.test_decode_side import FORMATS, PAGE, random_records
from tests.kernels.triton.calls import Random
from tests.tolerances import assert_near

BITS = [1, 2, 3, 4, 8]
DIMS = [8, 40, 128]


def random_codes(bits: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_bits_by_hand(bits: int, dim: int, device: torch.device) -> None:
    """Every byte is where python integers put it, for a number of rows that is odd."""
    codes = random_codes(bits, 35, dim)
    packed = pack.pack_bits(codes.to(device), bits)
    assert [bytes(row.tolist()) for row in packed.cpu()] == [bytes_by_hand(row.tolist(), bits) for row in codes]


@pytest.mark.parametrize("bits", BITS)
def test_strided_codes(bits: int, device: torch.device) -> None:
    """Codes whose rows do not lie side by side are packed as they would be in order."""
    codes = random_codes(bits, 2, 3, 5, 64)
    packed = pack.pack_bits(codes.to(device).transpose(0, 1), bits).transpose(0, 1).cpu()
    assert torch.equal(packed, pack.pack_bits(codes.to(device), bits).cpu())


def test_nothing_at_all(device: torch.device) -> None:
    """Without rows there is nothing to do."""
    codes = torch.empty(0, 64, dtype=torch.uint8, device=device)
    assert pack.pack_bits(codes, 4).shape == (0, 32)


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("name", FORMATS)
def test_decode_side(name: str, side: str, device: torch.device) -> None:
    """``(level * scale + zero) * other`` for every kind of format, into memory full of NaN, from strided records."""
    fmt, filler = FORMATS[name], SideFormat(48, 3, group=48)
    layout = PageLayout(*((fmt, filler) if side == "keys" else (filler, fmt)), PAGE)
    records, expected = random_records(layout, side, 4)
    spread = torch.full((2, 4, layout.record_bytes), 0xFF, dtype=torch.uint8)
    spread[:, ::2] = records.view(2, 2, -1)
    out = torch.full((2, 2, *expected.shape[1:]), float("nan"), device=device)
    decoded = pack.decode_side(layout, side, spread.to(device)[:, ::2], out)
    assert decoded.data_ptr() == out.data_ptr()
    assert_near(decoded.cpu().flatten(0, 1), expected)


def test_decode_dense_side(device: torch.device) -> None:
    """Dense pages come back bit for bit, and where no cast is needed without a copy."""
    for dtype in (torch.float32, torch.bfloat16):
        fmt = SideFormat(40, 8 * dtype.itemsize, level="dense", zero=False, dense_dtype=dtype)
        layout = PageLayout(fmt, fmt, PAGE)
        pages = Random(0).normal(3, PAGE, 40).to(dtype)
        records = pages.view(torch.uint8).flatten(1).repeat(1, 2).to(device)
        decoded = pack.decode_side(layout, "values", records, torch.full((3, PAGE, 40), float("nan"), device=device))
        assert torch.equal(decoded.cpu(), pages.float())
