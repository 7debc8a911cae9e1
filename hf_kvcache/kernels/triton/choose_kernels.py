"""The Triton kernels that choose the pages of a decode step, and their specializations for the compile report."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.inputs import MassRule
from hf_kvcache.kernels.triton.choose_columns import largest, ordered, write_entries
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.sides import TRITON_TYPES

#: Pages that a program scores, and its warps.
BLOCK, SCORE_WARPS = 32, 4
#: Wider heads take half as many pages a program where each query head has scores of its own.
_NARROW = 128
#: Columns of a table that one program can choose from: they lie in its registers.
MOST_COLUMNS = 4096


@triton.jit(do_not_specialize=["heads", "columns"])
def score_kernel(
    query,
    codes,
    scales,
    missing,
    scores,
    query_b,
    query_h,
    codes_row,
    scales_row,
    missing_row,
    heads,
    columns,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    SPANS: tl.constexpr,
    TWO: tl.constexpr,
    FIRST_WEIGHT: tl.constexpr,
    SECOND_WEIGHT: tl.constexpr,
    MISSING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The scores of ``BLOCK`` pages of a row; grid (blocks, rows).

    Args:
        query: ``[B, Hq, DIM]``, with strides ``query_b`` and ``query_h``.
        codes: int8 ``[rows, columns * SPANS, DIM or 2 * DIM]``, rows ``codes_row`` apart.
        scales: fp16 ``[rows, columns * SPANS]``, rows ``scales_row`` apart.
        missing: uint8 ``[rows, columns]``, nonzero where a row has no page; read if ``MISSING``.
        scores: fp32 ``[rows, columns]``, written.
        heads: KV heads of a sequence.
        columns: columns of the table.
        GROUP: query heads of a row.
        SPANS: parts of a page. A page has the score of its best part.
        TWO: whether a part has two vectors, side by side.
        FIRST_WEIGHT: the first vector meets the sum of the queries plus this times the sum of their absolute values.
        SECOND_WEIGHT: the same of the second one.
    """
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, DIM_PAD)
    inside, wide = column < columns, channel < DIM
    asked = query + row // heads * query_b + row % heads * GROUP * query_h
    total, size = tl.zeros([DIM_PAD], tl.float32), tl.zeros([DIM_PAD], tl.float32)
    for m in tl.static_range(GROUP):
        one = tl.load(asked + m * query_h + channel, mask=wide, other=0.0).to(tl.float32)
        total += one
        size += tl.abs(one)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for part in range(SPANS):
        vector = column.to(tl.int64) * SPANS + part
        at = codes + row * codes_row + vector[:, None] * (DIM * 2 if TWO else DIM) + channel[None, :]
        there = inside[:, None] & wide[None, :]
        products = tl.load(at, mask=there, other=0).to(tl.float32) * (total + FIRST_WEIGHT * size)[None, :]
        if TWO:
            products += tl.load(at + DIM, mask=there, other=0).to(tl.float32) * (total + SECOND_WEIGHT * size)[None, :]
        scale = tl.load(scales + row * scales_row + vector, mask=inside, other=0.0).to(tl.float32)
        best = tl.maximum(best, tl.sum(products, 1) * scale)
    if MISSING:
        gone = tl.load(missing + row * missing_row + column, mask=inside, other=1)
        best = tl.where(gone != 0, float("-inf"), best)
    tl.store(scores + row * columns + column, best, mask=inside)


@triton.jit(do_not_specialize=["heads", "columns"])
def mass_kernel(
    query,
    codes,
    scales,
    missing,
    scores,
    query_b,
    query_h,
    codes_row,
    scales_row,
    missing_row,
    heads,
    columns,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    SPANS: tl.constexpr,
    SCALING: tl.constexpr,
    REACH: tl.constexpr,
    BAND: tl.constexpr,
    BAND_PAD: tl.constexpr,
    BANDS_PAD: tl.constexpr,
    MISSING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The logarithm of the attention that each query head of a row is expected to pay to ``BLOCK`` parts of pages.

    Grid (blocks, rows). See :class:`hf_kvcache.kernels.inputs.MassRule`.

    Args:
        query: as in :func:`score_kernel`, like the arguments that are not named here.
        codes: int8 ``[rows, columns * SPANS, DIM + DIM / BAND]``, mean and standard deviation of the keys.
        scores: fp32 ``[rows, GROUP, columns * SPANS]``, written; ``-inf`` where a row has no page.
    """
    row = tl.program_id(1).to(tl.int64)
    vector, channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DIM_PAD)
    parts = columns * SPANS
    inside, wide = vector < parts, channel < DIM
    at = codes + row * codes_row + vector.to(tl.int64)[:, None] * (DIM + DIM // BAND)
    mean = tl.load(at + channel[None, :], mask=inside[:, None] & wide[None, :], other=0).to(tl.float32)
    band, within = tl.arange(0, BANDS_PAD), tl.arange(0, BAND_PAD)
    has = band < DIM // BAND
    square = tl.load(at + DIM + band[None, :], mask=inside[:, None] & has[None, :], other=0).to(tl.float32)
    square = square * square
    scale = tl.load(scales + row * scales_row + vector, mask=inside, other=0.0).to(tl.float32)
    asked = query + row // heads * query_b + row % heads * GROUP * query_h
    for m in range(GROUP):
        one = tl.load(asked + m * query_h + channel, mask=wide, other=0.0).to(tl.float32) * SCALING
        if BAND == 1:
            power = one * one
        else:
            places = band[:, None] * BAND + within[None, :]
            held = has[:, None] & (within < BAND)[None, :]
            banded = tl.load(asked + m * query_h + places, mask=held, other=0.0).to(tl.float32) * SCALING
            power = tl.sum(banded * banded, 1) / BAND
        spread = tl.sqrt(tl.sum(square * power[None, :], 1)) * scale
        more = tl.where(spread < REACH, 0.5 * spread * spread, REACH * (spread - 0.5 * REACH))
        mass = tl.sum(mean * one[None, :], 1) * scale + more
        if MISSING:
            gone = tl.load(missing + row * missing_row + vector // SPANS, mask=inside, other=1)
            mass = tl.where(gone != 0, float("-inf"), mass)
        tl.store(scores + (row * GROUP + m) * parts + vector, mass, mask=inside)


@triton.jit
def _probability(scores, column, inside, GROUP: tl.constexpr, SPANS: tl.constexpr, COLUMNS_PAD: tl.constexpr, parts):
    """The probabilities of the pages of a row, summed over its query heads; ``-inf`` where there is no page.

    Args:
        scores: fp32 ``[GROUP, parts]``, what :func:`mass_kernel` has written for the row.
        column: the columns of the pages.
        inside: whether there is such a column.
    """
    total, held = tl.zeros([COLUMNS_PAD], tl.float32), inside
    for m in range(GROUP):
        at = scores + m * parts + column * SPANS
        top = tl.full([COLUMNS_PAD], float("-inf"), tl.float32)
        for part in range(SPANS):
            top = tl.maximum(top, tl.load(at + part, mask=inside, other=float("-inf")))
        held = top > float("-inf")
        most = tl.max(top, 0)
        most = tl.where(most > float("-inf"), most, 0.0)
        mass = tl.zeros([COLUMNS_PAD], tl.float32)
        for part in range(SPANS):
            mass += tl.exp(tl.load(at + part, mask=inside, other=float("-inf")) - most)
        of_all = tl.sum(mass, 0)
        total += mass / tl.where(of_all > 0, of_all, 1.0)
    return tl.where(held, total, float("-inf"))


@triton.jit(do_not_specialize=["rows", "capacity", "columns", "count"])
def pick_kernel(
    scores,
    limits,
    pages,
    chosen,
    table,
    rows,
    capacity,
    columns,
    count,
    LIMITED: tl.constexpr,
    GROUP: tl.constexpr,
    SPANS: tl.constexpr,
    COLUMNS_PAD: tl.constexpr,
    COUNT_PAD: tl.constexpr,
):
    """The pages of a row with the largest scores, of equal ones those that come first; grid (rows).

    The smallest score that is chosen is found bit by bit: floats are compared as integers of the same order.

    Args:
        scores: fp32 ``[rows, columns]``; with a ``GROUP`` above 0 what :func:`mass_kernel` has written, of which the
            scores are made here.
        limits: int64 ``[rows]``, how many pages a row may have; read if ``LIMITED``.
        pages: int64 ``[3, rows, capacity]``, the table of all pages.
        chosen: int64 ``[rows, count]``, written: columns, ascending, then ``NO_COLUMN`` where there are fewer.
        table: int64 ``[3, rows, count]``, written: what ``pages`` says of them, then 0.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS_PAD)
    inside = column < columns
    if GROUP > 0:
        parts = columns * SPANS
        score = _probability(scores + row * GROUP * parts, column, inside, GROUP, SPANS, COLUMNS_PAD, parts)
    else:
        score = tl.load(scores + row * columns + column, mask=inside, other=0.0)
    most = count
    if LIMITED:
        most = tl.minimum(tl.load(limits + row), count).to(tl.int32)
    picked = largest(ordered(score, inside), inside, most)
    write_entries(picked, column, pages, chosen, table, row, rows, capacity, count, COUNT_PAD)


def score_constants(
    dim: int, group: int, spans: int, rule: tuple[float, ...] | MassRule, missing: bool
) -> dict[str, Any]:
    """The constants of :func:`score_kernel`, or of :func:`mass_kernel` for a rule of attention."""
    shape = {"DIM": dim, "DIM_PAD": triton.next_power_of_2(dim), "GROUP": group, "SPANS": spans, "MISSING": missing}
    if isinstance(rule, MassRule):
        block = BLOCK if dim <= _NARROW else BLOCK // 2
        band = {"BAND": rule.band, "BAND_PAD": triton.next_power_of_2(rule.band)}
        band["BANDS_PAD"] = triton.next_power_of_2(dim // rule.band)
        return shape | band | {"SCALING": rule.scaling, "REACH": rule.reach, "BLOCK": block}
    weights = {"TWO": len(rule) == 2, "FIRST_WEIGHT": rule[0], "SECOND_WEIGHT": rule[-1]}
    return shape | weights | {"BLOCK": BLOCK}


def pick_constants(
    columns: int, count: int, limited: bool, group: int = 0, spans: int = 1
) -> tuple[dict[str, Any], int]:
    """The constants of :func:`pick_kernel`, and its warps; ``group`` is above 0 for a rule of attention."""
    pads = column_pads(columns, count)
    return {"LIMITED": limited, "GROUP": group, "SPANS": spans, **pads}, pick_warps(pads["COLUMNS_PAD"])


def column_pads(columns: int, count: int) -> dict[str, int]:
    """Room of a program for the columns of a row, and for those that are chosen."""
    # At least 256, so that a growing table seldom needs another kernel.
    padded = max(256, triton.next_power_of_2(columns))
    return {"COLUMNS_PAD": padded, "COUNT_PAD": min(padded, max(64, triton.next_power_of_2(count)))}


def pick_warps(cells: int) -> int:
    """Warps of a program that chooses from so many numbers."""
    return min(16, max(4, cells // 512))


def compile_cases(architecture: str) -> list[CompileCase]:
    """Moments, quest and landmarks with heads of 128 and 64, whole pages and parts; tables of three sizes."""
    rule, weights = MassRule(0.125, 1.77, 8), (0.3, -0.3)
    scored = [
        _score_case("moments", 128, 4, 2, rule),
        _score_case("moments", 64, 3, 2, rule),
        _score_case("moments by element", 128, 4, 1, MassRule(0.125, 1.77)),
        _score_case("moments", 256, 8, 2, rule),
        _score_case("quest", 128, 4, 1, weights),
        _score_case("quest", 64, 3, 4, weights),
        _score_case("quest", 256, 2, 1, weights),
        _score_case("landmark", 128, 8, 1, (0.0,)),
    ]
    picked = [_pick_case(columns, count) for columns, count in ((512, 128), (2048, 204), (MOST_COLUMNS, 1024))]
    return [*scored, *picked, _pick_case(512, 128, 4, 2), _pick_case(MOST_COLUMNS, 1024, 3, 2)]


def _score_case(name: str, dim: int, group: int, spans: int, rule: tuple[float, ...] | MassRule) -> CompileCase:
    pointers = {"query": f"*{TRITON_TYPES[torch.bfloat16]}", "codes": "*i8", "scales": "*fp16"}
    pointers |= {"missing": "*u8", "scores": "*fp32"}
    strides = "query_b", "query_h", "codes_row", "scales_row", "missing_row"
    return CompileCase(
        name=f"choose {name} d{dim} spans={spans}",
        kernel=mass_kernel if isinstance(rule, MassRule) else score_kernel,
        signature=pointers | dict.fromkeys((*strides, "heads", "columns"), "i32"),
        constants=score_constants(dim, group, spans, rule, False),
        num_warps=SCORE_WARPS,
        num_stages=1,
        aligned=(*pointers, "query_b", "query_h", "codes_row"),
    )


def _pick_case(columns: int, count: int, group: int = 0, spans: int = 1) -> CompileCase:
    pointers = {"scores": "*fp32", **dict.fromkeys(("limits", "pages", "chosen", "table"), "*i64")}
    constants, warps = pick_constants(columns, count, True, group, spans)
    return CompileCase(
        name=f"choose {count} of {columns}" + (f" by {group} heads, spans={spans}" if group else ""),
        kernel=pick_kernel,
        signature=pointers | dict.fromkeys(("rows", "capacity", "columns", "count"), "i32"),
        constants=constants,
        num_warps=warps,
        num_stages=1,
        aligned=tuple(pointers),
    )
