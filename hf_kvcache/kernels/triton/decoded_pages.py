"""Pages decoded into scratch memory, a bounded number of tokens at a time, where many queries read them.

A kernel that decodes pages as it reads them decodes them once for every block of queries. With hundreds of queries it
is cheaper to decode a page once, and to read the result as full-precision tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.inputs import DenseTokens, Pages
from hf_kvcache.kernels.page import PageLayout
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.configs import dot_precision, lanes
from hf_kvcache.kernels.triton.elements import load_elements
from hf_kvcache.kernels.triton.sides import (
    TRITON_TYPES,
    Side,
    channels,
    describe_side,
    level_tables,
    load_table,
)
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.kernels.workspace import scratch

#: Bytes of decoded tokens at a time, at most, unless a single column of pages has more: so few that the second-level
#: cache of a large GPU holds them from their decoding to their last reading.
SCRATCH_BYTES = 16 << 20
#: Tokens of a row at a time, at least, unless these are more than :data:`MOST_SCRATCH_BYTES`: between two portions of
#: tokens, partial results are written and read.
LEAST_TOKENS = 4096
MOST_SCRATCH_BYTES = 64 << 20
#: Elements of a side that a thread decodes at a time; of float32 half as many, which take twice as many registers.
_PER_THREAD = 64
_WARPS = 4


@triton.jit
def _store_side(
    record, token, first, held, table, mean, out, side: tl.constexpr, TOKENS: tl.constexpr, CENTERED: tl.constexpr
):
    """Decode ``TOKENS`` tokens of a side of a page into rows of ``out``, plus ``mean [dim]`` if it is ``CENTERED``."""
    channel, there = channels(side)
    x = load_elements(record, first, held, table, channel, there, side, TOKENS, True).to(tl.float32)
    if CENTERED:
        x += tl.load(mean + channel, mask=there, other=0.0)[None, :]
    at = token.to(tl.int64)[:, None] * side.dim + channel[None, :]
    tl.store(out + at, x.to(out.dtype.element_ty), mask=(token < side.page)[:, None] & there[None, :])


@triton.jit(do_not_specialize=["rows", "capacity", "first_column", "taken"])
def decode_kernel(
    # Pages.
    pages,
    page_positions,
    key_mean,
    tables,
    # Outputs.
    keys,
    values,
    positions,
    unused,
    # Sizes.
    rows,
    capacity,
    first_column,
    taken,
    # Constant sizes.
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    TOKENS: tl.constexpr,
    # Switches.
    CENTERED: tl.constexpr,
    PLACED: tl.constexpr,
    UNUSED: tl.constexpr,
):
    """Decode ``TOKENS`` tokens of a page, both sides, in the rotated basis; grid (rows times columns, token blocks).

    Args:
        pages: int64 ``[3, rows, capacity]``: addresses of the records, token counts, first positions.
        page_positions: int32 ``[rows, capacity, P]``; read if ``PLACED == 2``.
        key_mean: fp32 ``[rows, Dk]``, added to the keys; read if ``CENTERED``.
        tables: fp32 ``[2, 16]``, the levels of keys and values; read where a side has ``level="table"``.
        keys: ``[rows, taken * P, Dk]``, written; where there is no token, with anything finite.
        values: ``[rows, taken * P, Dv]``, written likewise; not if ``VALUES`` is None.
        positions: int64 ``[rows, taken * P]``, written if ``PLACED``.
        unused: uint8 of the same shape, 1 where there is no token; written if ``UNUSED``.
        rows: sequences times KV heads.
        capacity: the distance between rows of the table.
        first_column: the first column to decode.
        taken: the number of columns to decode.
        KEYS: the key side of a page.
        VALUES: the value side; None if it has no width.
        PLACED: 0 if positions are not wanted, 1 if pages hold tokens side by side, 2 if ``page_positions`` says where.
    """
    row = (tl.program_id(0) // taken).to(tl.int64)
    column = tl.program_id(0) % taken
    place = row * capacity + first_column + column
    first = tl.program_id(1) * TOKENS
    token = first + tl.arange(0, TOKENS)
    count = tl.load(pages + rows.to(tl.int64) * capacity + place).to(tl.int32)
    record = tl.multiple_of(tl.load(pages + place).to(tl.pointer_type(tl.uint8)), 16)
    to = (row * taken + column) * KEYS.page
    key_table = load_table(tables, KEYS)
    mean = key_mean + row * KEYS.dim
    _store_side(record, token, first, count - first, key_table, mean, keys + to * KEYS.dim, KEYS, TOKENS, CENTERED)
    if VALUES is not None:
        value_table = load_table(tables + 16, VALUES)
        to_values = values + to * VALUES.dim
        _store_side(record, token, first, count - first, value_table, mean, to_values, VALUES, TOKENS, False)
    inside = token < KEYS.page
    if PLACED == 1:
        start = tl.load(pages + 2 * rows.to(tl.int64) * capacity + place)
        tl.store(positions + to + token, start + token, mask=inside)
    if PLACED == 2:
        at = tl.load(page_positions + place * KEYS.page + token, mask=inside, other=0)
        tl.store(positions + to + token, at.to(tl.int64), mask=inside)
    if UNUSED:
        tl.store(unused + to + token, (token >= count).to(tl.uint8), mask=inside)


class Decoded(NamedTuple):
    """Decoded pages of some columns, in the rotated basis; valid until more pages are decoded on this thread.

    Attributes:
        start: the first of the columns.
        keys: ``[rows, n, Dk]``, the key mean included.
        values: ``[rows, n, Dv]``.
        positions: int64 ``[rows, n]``; None if every query sees every token.
        unused: uint8 ``[rows, n]``, 1 where there is no token; None if there is a token everywhere.
    """

    start: int
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor | None
    unused: torch.Tensor | None

    @property
    def tokens(self) -> DenseTokens:
        """The same as tokens of one KV head, a row being a sequence."""
        unused = None if self.unused is None else self.unused.view(torch.bool)
        return DenseTokens(self.keys[:, None], self.values[:, None], self.positions, unused)


def decoded_pages(
    pages: Pages, visibility: Visibility, dtypes: tuple[torch.dtype, ...], arch: str
) -> Iterator[Decoded]:
    """All pages, decoded once each, at most :data:`SCRATCH_BYTES` at a time.

    Args:
        pages: the pages.
        visibility: what the queries may see; it says whether positions are needed.
        dtypes: of the decoded keys and values.
        arch: the architecture of the device.
    """
    step = columns_at_a_time(pages, dtypes)
    held = pages.first[pages.counts > 0]
    placed = 0
    if not visibility.sees_all(int(held.min()) if held.size else 0):
        placed = 2 if pages.scattered else 1
    for start in range(0, pages.columns, step):
        yield _decode(pages, start, min(step, pages.columns - start), placed, dtypes, arch)


def columns_at_a_time(pages: Pages, dtypes: tuple[torch.dtype, ...]) -> int:
    """The number of columns that :func:`decoded_pages` decodes at a time."""
    dims = [side.dim for side in pages.layout.sides.values()]
    token_bytes = pages.rows * sum(dim * dtype.itemsize for dim, dtype in zip(dims, dtypes, strict=True))
    wanted = min(MOST_SCRATCH_BYTES, max(SCRATCH_BYTES, LEAST_TOKENS * token_bytes))
    return max(1, min(pages.columns, wanted // (token_bytes * pages.layout.page_size)))


def _decode(pages: Pages, start: int, taken: int, placed: int, dtypes: tuple[torch.dtype, ...], arch: str) -> Decoded:
    layout, rows = pages.layout, pages.rows
    count = taken * layout.page_size
    keys, values = (
        scratch(f"triton.decoded.{name}", (rows, count, fmt.dim), dtype, pages.device)
        for (name, fmt), dtype in zip(layout.sides.items(), dtypes, strict=True)
    )
    ragged = not pages.full and bool((pages.counts[:, start : start + taken] < layout.page_size).any())
    unused = scratch("triton.decoded.unused", (rows, count), torch.uint8, pages.device) if ragged else None
    positions = scratch("triton.decoded.positions", (rows, count), torch.int64, pages.device) if placed else None
    table = pages.on_device(positions=placed == 2)
    constants = decode_constants(layout, dtypes, arch)
    decode_kernel[rows * taken, triton.cdiv(layout.page_size, constants["TOKENS"])](
        table.table,
        table.table if table.positions is None else table.positions,
        table.table if pages.key_mean is None else pages.key_mean,
        level_tables(layout.sides["keys"].table, layout.sides["values"].table, pages.device),
        keys,
        values,
        table.table if positions is None else positions,
        table.table if unused is None else unused,
        rows,
        table.capacity,
        start,
        taken,
        **constants,
        CENTERED=pages.key_mean is not None,
        PLACED=placed,
        UNUSED=ragged,
        num_warps=_WARPS,
    )
    return Decoded(start, keys, values, positions, unused)


def decode_constants(layout: PageLayout, dtypes: tuple[torch.dtype, ...], arch: str) -> dict[str, Any]:
    """The constant sizes of :func:`decode_kernel`: the sides, and the tokens that a program decodes at a time."""
    sides = [_side(layout, name, dtypes[0], arch) for name in ("keys", "values")]
    widest = max(side.dim_pad for side in sides if side is not None)
    elements = _PER_THREAD // 2 if torch.float32 in dtypes else _PER_THREAD
    tokens = triton.next_power_of_2(elements * _WARPS * lanes(arch) // widest)
    most = triton.next_power_of_2(layout.page_size)
    return {"KEYS": sides[0], "VALUES": sides[1], "TOKENS": max(1, min(tokens, most))}


def _side(layout: PageLayout, name: str, dtype: torch.dtype, arch: str) -> Side | None:
    if layout.sides[name].dim == 0:
        return None
    if dtype == torch.float16:
        side = describe_side(layout, name, tl.float16, False, dot_precision(arch))
        if side.scaling:
            return side
    return describe_side(layout, name, tl.float32, False)


def decode_case(arch: str, name: str, layout: PageLayout, dtypes: tuple[torch.dtype, ...]) -> CompileCase:
    """:func:`decode_kernel` for the compile report, with everything that it may have to write."""
    types = [str(TRITON_TYPES[dtype]) for dtype in dtypes]
    pointers = {
        "pages": "*i64",
        "page_positions": "*i32",
        "key_mean": "*fp32",
        "tables": "*fp32",
        "keys": f"*{types[0]}",
    }
    pointers |= {"values": f"*{types[1]}", "positions": "*i64", "unused": "*u8"}
    centered = layout.sides["keys"].centered
    return CompileCase(
        name=name,
        kernel=decode_kernel,
        signature=pointers | dict.fromkeys(("rows", "capacity", "first_column", "taken"), "i32"),
        constants=decode_constants(layout, dtypes, arch) | {"CENTERED": centered, "PLACED": 1, "UNUSED": True},
        num_warps=_WARPS,
        num_stages=2,
        aligned=tuple(pointers),
    )
