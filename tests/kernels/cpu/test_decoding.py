"""``hfkv_decode_side`` against decoding in float64."""

from __future__ import annotations

from ctypes import byref
from itertools import product

import numpy as np
import pytest
import torch

from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.cpu.layouts import native_layout
from hf_kvcache.kernels.page import PageLayout, SideFormat
from tests.kernels.cpu.brute_force import decode_record
from tests.kernels.cpu.cases import Shape, formats_of, random_records
from tests.kernels.cpu.grid import CODECS, SHAPES, fits
from tests.tolerances import assert_near

GUARD, CANARY = 64, 12345.0
#: Formats that no codec makes today.
OTHERS = {
    "values per channel": (
        SideFormat(64, 4, axis="channel", group=24, other=True),
        SideFormat(40, 3, axis="channel", group=8),
    ),
    "no zero": (
        SideFormat(72, 2, axis="channel", group=6, zero=False),
        SideFormat(48, 8, group=16, zero=False, other=True),
    ),
    "float8 per channel": (
        SideFormat(36, 8, "float8", "channel", 24, zero=False),
        SideFormat(100, 8, "float8", group=100),
    ),
}


def check(layout: PageLayout, threads: int = 1, count: int = 5) -> None:
    """Both sides of some records, taken out of order, into NaN between guards."""
    native = native_layout(layout)
    assert native is not None
    records = random_records(layout, count, np.random.default_rng(count))
    order = np.random.default_rng(0).permutation(count)
    addresses = records.ctypes.data + order.astype(np.int64) * layout.record_bytes
    for side, fmt in layout.sides.items():
        buffer = torch.full((count * layout.page_size * fmt.dim + 2 * GUARD,), CANARY)
        out = buffer[GUARD:-GUARD].fill_(torch.nan)
        library.load().hfkv_decode_side(
            byref(native), side == "values", addresses.ctypes.data, count, out.data_ptr(), threads
        )
        expected = np.stack([decode_record(layout, side, records[i]) for i in order])
        assert_near(out.view(expected.shape), torch.from_numpy(expected))
        assert (buffer[:GUARD] == CANARY).all() and (buffer[-GUARD:] == CANARY).all()


@pytest.mark.parametrize("codec", CODECS)
def test_codecs(codec: str, loaded: None) -> None:
    """Every codec, for three shapes that it fits, on every instruction set."""
    spec, options = CODECS[codec]
    before = library.isa()
    try:
        for isa, shape in product(library.available_isas(), [s for s in SHAPES if fits(codec, s)][::4]):
            library.set_isa(isa)
            try:
                check(PageLayout(*formats_of(spec, shape, **options), shape.page_size))
            except AssertionError as error:
                raise AssertionError(f"{isa}: {shape}") from error
    finally:
        library.set_isa(before)


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats(isa: str, name: str) -> None:
    check(PageLayout(*OTHERS[name], 24))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_width(isa: str, bits: int) -> None:
    """Rows of codes of any length: vectors of all sizes, vectors that overlap, and single bytes."""
    for dim in (*range(8, 296, 8), 1024, 1032):
        side = SideFormat(dim, bits, axis="token", group=dim)
        check(PageLayout(side, side, page_size=1 + dim // 8 % 4), count=2)


@pytest.mark.parametrize(("threads", "count"), [(1, 13), (2, 1), (2, 2), (3, 1), (3, 13)])
def test_threads(isa: str, threads: int, count: int) -> None:
    """More and fewer pages than threads."""
    shape = Shape(128, 64)
    check(PageLayout(*formats_of("int3", shape), shape.page_size), threads, count)
