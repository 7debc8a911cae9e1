"""Decoding of page records against the formula, worked out one element at a time in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_kvcache.kernels.pack import decode_side
from hf_kvcache.kernels.page import PageLayout, SideFormat
from hf_kvcache.kernels.reference import levels
from hf_kvcache.kernels.reference.levels import SideDecoder
from tests.kernels.bytes_by_hand import bytes_by_hand
from tests.tolerances import assert_near

PAGE = 16
CUBES, RAMP = tuple(i**3 / 9 for i in range(-4, 4)), tuple(i / 7 for i in range(16))
FORMATS = {
    "keys per channel": SideFormat(64, 4, axis="channel", group=16),
    "keys per channel, groups": SideFormat(80, 3, axis="channel", group=4),
    "keys per channel, second scale": SideFormat(64, 2, axis="channel", group=16, other=True),
    "keys per channel, no zero": SideFormat(72, 8, axis="channel", group=8, zero=False),
    "values per token": SideFormat(96, 2, axis="token", group=96),
    "values per token, groups": SideFormat(64, 3, axis="token", group=16),
    "values per token, second scale": SideFormat(40, 4, axis="token", group=40, other=True),
    "values per token, groups, second scale, no zero": SideFormat(64, 1, group=32, other=True, zero=False),
    "table of 2": SideFormat(64, 1, level="table", group=64, zero=False, table=(-0.75, 0.5)),
    "table of 4": SideFormat(80, 2, level="table", group=40, zero=False, table=(-1.5, -0.5, 0.25, 2.0)),
    "table of 8 with zero": SideFormat(64, 3, level="table", group=64, table=CUBES),
    "table of 16": SideFormat(64, 4, level="table", group=64, zero=False, table=RAMP),
    "float8": SideFormat(72, 8, level="float8", group=72, zero=False),
}


def float8_by_hand(byte: int) -> float:
    """The number that an e4m3 byte stands for."""
    sign, exponent, mantissa = -1 if byte & 0x80 else 1, (byte >> 3) & 15, byte & 7
    return sign * (math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10))


def random_side(fmt: SideFormat, rng: np.random.Generator) -> tuple[dict[str, bytes], list[list[float]]]:
    """The bytes of each field of a random page, and what they decode to."""
    codes = rng.integers(0, 2**fmt.bits, (PAGE, fmt.dim))
    if fmt.level == "float8":
        codes[codes & 0x7F == 0x7F] = 0  # not a number
    per_channel = fmt.axis == "channel"
    shape = (PAGE // fmt.group, fmt.dim) if per_channel else (PAGE, fmt.dim // fmt.group)
    scale = rng.uniform(0.01, 2, shape).astype(np.float16)
    zero = rng.normal(0, 3, shape).astype(np.float16)
    other = rng.uniform(0.1, 4, PAGE if per_channel else fmt.dim).astype(np.float16)
    expected = []
    for t in range(PAGE):
        row = []
        for c in range(fmt.dim):
            code = int(codes[t, c])
            level = {"table": lambda i: fmt.table[i], "float8": float8_by_hand}.get(fmt.level, float)(code)
            cell = (t // fmt.group, c) if per_channel else (t, c // fmt.group)
            value = level * float(scale[cell]) + (float(zero[cell]) if fmt.zero else 0.0)
            row.append(value * (float(other[t if per_channel else c]) if fmt.other else 1.0))
        expected.append(row)
    packed = b"".join(bytes_by_hand(row, fmt.bits) for row in codes.tolist())
    fields = {"codes": packed, "scale": scale.tobytes()}
    fields |= {"zero": zero.tobytes()} if fmt.zero else {}
    fields |= {"other": other.tobytes()} if fmt.other else {}
    return fields, expected


def random_records(layout: PageLayout, side: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Records with one side filled and everything else 0xFF, and what that side decodes to, float64."""
    rng = np.random.default_rng(count)
    records = np.full((count, layout.record_bytes), 0xFF, dtype=np.uint8)
    pages = []
    for record in records:
        fields, expected = random_side(layout.sides[side], rng)
        for name, content in fields.items():
            offset = layout.fields[f"{side}.{name}"].offset
            record[offset : offset + len(content)] = np.frombuffer(content, np.uint8)
        pages.append(expected)
    return torch.from_numpy(records), torch.tensor(pages, dtype=torch.float64)


@pytest.mark.parametrize("decode", [decode_side, levels.decode_side], ids=["dispatched", "reference"])
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("name", FORMATS)
def test_formula(name: str, side: str, decode: SideDecoder) -> None:
    """``(level * scale + zero) * other`` for every kind of format, into memory full of NaN."""
    fmt, filler = FORMATS[name], SideFormat(48, 3, group=48)
    layout = PageLayout(*((fmt, filler) if side == "keys" else (filler, fmt)), PAGE)
    records, expected = random_records(layout, side, 4)
    out = torch.full(expected.shape, float("nan"))
    decoded = decode(layout, side, records, out)
    assert decoded.data_ptr() == out.data_ptr()
    assert_near(decoded, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_more_dimensions_and_strides(name: str) -> None:
    """Records ``[C, rows, bytes]`` that are a strided view decode as they would one by one."""
    layout = PageLayout(FORMATS[name], SideFormat(48, 3, group=48), PAGE)
    records, expected = random_records(layout, "keys", 6)
    spread = torch.full((2, 6, layout.record_bytes), 0xFF, dtype=torch.uint8)
    spread[:, ::2] = records.view(2, 3, -1)
    out = torch.full((2, 3, *expected.shape[1:]), float("nan"))
    assert_near(decode_side(layout, "keys", spread[:, ::2], out).flatten(0, 1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_pages(dtype: torch.dtype) -> None:
    """Dense pages come back bit for bit, and where no cast is needed without a copy."""
    fmt = SideFormat(40, 8 * dtype.itemsize, level="dense", zero=False, dense_dtype=dtype)
    layout = PageLayout(fmt, fmt, PAGE)
    pages = torch.randn(3, PAGE, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    records = torch.full((3, layout.record_bytes), 0xFF, dtype=torch.uint8)
    size = PAGE * 40 * dtype.itemsize
    records[:, layout.record_bytes - size :] = pages.view(torch.uint8).flatten(1)
    out = torch.full((3, PAGE, 40), float("nan"))
    decoded = decode_side(layout, "values", records, out)
    assert torch.equal(decoded, pages.float())
    shares = decoded.untyped_storage().data_ptr() == records.untyped_storage().data_ptr()
    assert shares == (dtype == torch.float32)
