"""Bytes of a page, by the formula of each codec."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hf_kvcache.codecs import available, resolve, specs
from tests.choosing import pairwise
from tests.codecs.pages_of import gaussian, make_encoder, name_of

WIDTHS = [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (96, 64), (192, 128)]


def integers(tokens: int, keys: int, values: int, bits: int) -> list[int]:
    """Codes, a half-precision scale and zero per channel for keys, the same per token for values."""
    return [
        tokens * keys * bits // 8,
        2 * keys,
        2 * keys,
        tokens * values * bits // 8,
        2 * tokens,
        2 * tokens,
    ]


def with_second_scales(tokens: int, keys: int, values: int, bits: int) -> list[int]:
    return [*integers(tokens, keys, values, bits), 2 * tokens, 2 * values]


#: Bytes of each field as a function of the page size, the two widths and the bits.
FIELDS: dict[str, Callable[[int, int, int, int], list[int]]] = {
    "int": integers,
    "rotated": integers,
    "kvarn": with_second_scales,
    "turboquant": lambda t, k, v, b: [t * k * b // 8, 2 * t, t * v * b // 8, 2 * t],
    "unbiased": lambda t, k, v, b: [t * k * b // 8, 2 * k, 2 * k, 2 * t, t * v * b // 8, 2 * t],
    "fp8": lambda t, k, v, b: [t * k, 2 * t, t * v, 2 * t],
    "none": lambda t, k, v, b: [4 * t * k, 4 * t * v],
    "bf16": lambda t, k, v, b: [2 * t * k, 2 * t * v],
}


@pairwise(
    "spec, widths, page_size",
    [spec for spec in specs() if name_of(spec) in FIELDS],
    WIDTHS,
    [16, 64, 128],
    of=lambda spec, widths, page_size: (name_of(spec), widths, page_size),
)
def test_bytes(spec: str, widths: tuple[int, int], page_size: int) -> None:
    """A record has the bytes of its fields, each rounded up to 16, and the encoder makes such records."""
    name, (key_dim, value_dim) = name_of(spec), widths
    expected = FIELDS[name](page_size, key_dim, value_dim, int(spec[len(name) :] or 0))
    encoder = make_encoder(spec, key_dim, value_dim, page_size)
    layout = encoder.layout
    assert sorted(field.nbytes for field in layout.fields.values()) == sorted(expected)
    assert layout.record_bytes == sum((size + 15) // 16 * 16 for size in expected)
    assert layout.code_bytes + layout.scale_bytes == sum(expected)
    assert layout.bits_per_element == pytest.approx(8 * sum(expected) / (page_size * (key_dim + value_dim)), rel=1e-12)
    records = encoder.encode(gaussian(0, 2, page_size, key_dim), gaussian(1, 2, page_size, value_dim), None)
    assert records.dtype == torch.uint8 and records.shape == (2, layout.record_bytes)


def test_the_formulas_name_codecs_that_exist() -> None:
    """Every formula above belongs to a codec."""
    assert set(FIELDS) <= set(available())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_kvarn_costs_three_eighths_of_a_bit(bits: int) -> None:
    """The paper's b + 0.375 bits at 128 tokens of 128 channels."""
    assert make_encoder(f"kvarn{bits}", 128, page_size=128).layout.bits_per_element == bits + 0.375


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_pages_keep_the_dtype(dtype: torch.dtype) -> None:
    """Without a codec an element has the bytes that it has in the model."""
    assert make_encoder("none", 80, page_size=16, dtype=dtype).layout.bits_per_element == 8 * dtype.itemsize


@pytest.mark.parametrize("spec", ["int4", "rotated2"])
def test_groups_cost_their_scales(spec: str) -> None:
    """A scale and a zero per 32 elements are one bit more per element."""
    encoder = make_encoder(resolve(spec, group_size=32), 64, page_size=64)
    assert encoder.layout.bits_per_element == int(spec[-1]) + 1


@pairwise(
    "spec, widths",
    [spec for spec in specs() if spec != "none"],
    [(64, 64), (96, 64), (80, 80)],
    of=lambda spec, widths: (name_of(spec), widths),
)
def test_every_byte_is_written(spec: str, widths: tuple[int, int]) -> None:
    """The fields of a page keep nothing of the earlier contents of its memory, and nothing else is written."""
    encoder = make_encoder(spec, *widths, page_size=16)
    pages = {"keys": gaussian(2, 3, 16, widths[0]), "values": gaussian(3, 3, 16, widths[1])}
    written = {}
    for before in (0x00, 0xFF):
        records = torch.full((3, encoder.layout.record_bytes), before, dtype=torch.uint8)
        for side, side_codec in (("keys", encoder.codec.keys), ("values", encoder.codec.values)):
            encoder._encode_side(side, side_codec, pages[side], None, None, records)
        written[before] = records
    inside = torch.zeros(encoder.layout.record_bytes, dtype=torch.bool)
    for field in encoder.layout.fields.values():
        inside[field.offset : field.offset + field.nbytes] = True
    assert torch.equal(written[0][:, inside], written[0xFF][:, inside])
    assert (written[0][:, ~inside] == 0).all() and (written[0xFF][:, ~inside] == 0xFF).all()
