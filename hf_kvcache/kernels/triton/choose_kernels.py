"""The Triton kernels that choose the pages of a decode step, and their specializations for the compile report."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.reference.choose import NO_COLUMN
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.sides import TRITON_TYPES

#: Pages that a program scores, and its warps.
BLOCK, SCORE_WARPS = 32, 4
#: Columns of a table that one program can choose from: they lie in its registers.
MOST_COLUMNS = 4096
_NO_COLUMN = tl.constexpr(NO_COLUMN)
_LEAST_KEY = tl.constexpr(-(1 << 31))


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
    COLUMNS_PAD: tl.constexpr,
    COUNT_PAD: tl.constexpr,
):
    """The pages of a row with the largest scores, of equal ones those that come first; grid (rows).

    The smallest score that is chosen is found bit by bit: floats are compared as integers of the same order.

    Args:
        scores: fp32 ``[rows, columns]``.
        limits: int64 ``[rows]``, how many pages a row may have; read if ``LIMITED``.
        pages: int64 ``[3, rows, capacity]``, the table of all pages.
        chosen: int64 ``[rows, count]``, written: columns, ascending, then ``NO_COLUMN`` where there are fewer.
        table: int64 ``[3, rows, count]``, written: what ``pages`` says of them, then 0.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS_PAD)
    inside = column < columns
    bits = tl.load(scores + row * columns + column, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    key = tl.where(inside, bits ^ ((bits >> 31) & 0x7FFFFFFF), _LEAST_KEY)
    most = count
    if LIMITED:
        most = tl.minimum(tl.load(limits + row), count).to(tl.int32)
    one = tl.full([], 1, tl.int32)
    least = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= most, one * 0, one * _LEAST_KEY)
    for bit in range(31):
        candidate = least | (one << (30 - bit))
        enough = tl.sum((key >= candidate).to(tl.int32), 0) >= most
        least = tl.where(enough, candidate, least)
    greater, equal = key > least, inside & (key == least)
    left = most - tl.sum(greater.to(tl.int32), 0)
    picked = greater | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))
    place = tl.cumsum(picked.to(tl.int32), 0) - 1
    to, stride = row * count, rows.to(tl.int64) * count
    tl.store(chosen + to + place, column.to(tl.int64), mask=picked)
    behind = tl.arange(0, COUNT_PAD)
    rest = (behind >= tl.sum(picked.to(tl.int32), 0)) & (behind < count)
    tl.store(chosen + to + behind, tl.full([COUNT_PAD], _NO_COLUMN, tl.int64), mask=rest)
    for part in tl.static_range(3):
        entry = tl.load(pages + (part * rows.to(tl.int64) + row) * capacity + column, mask=picked, other=0)
        tl.store(table + part * stride + to + place, entry, mask=picked)
        tl.store(table + part * stride + to + behind, tl.zeros([COUNT_PAD], tl.int64), mask=rest)


def score_constants(dim: int, group: int, spans: int, size_weights: tuple[float, ...], missing: bool) -> dict[str, Any]:
    """The constants of :func:`score_kernel`."""
    return {
        "DIM": dim,
        "DIM_PAD": triton.next_power_of_2(dim),
        "GROUP": group,
        "SPANS": spans,
        "TWO": len(size_weights) == 2,
        "FIRST_WEIGHT": size_weights[0],
        "SECOND_WEIGHT": size_weights[-1],
        "MISSING": missing,
        "BLOCK": BLOCK,
    }


def pick_constants(columns: int, count: int, limited: bool) -> tuple[dict[str, Any], int]:
    """The constants of :func:`pick_kernel`, and its warps."""
    # At least 256, so that a growing table seldom needs another kernel.
    padded = max(256, triton.next_power_of_2(columns))
    pads = {"COLUMNS_PAD": padded, "COUNT_PAD": min(padded, max(64, triton.next_power_of_2(count)))}
    return {"LIMITED": limited, **pads}, min(16, max(4, padded // 512))


def compile_cases(architecture: str) -> list[CompileCase]:
    """Quest and landmarks with heads of 128 and 64, whole pages and parts of 16 tokens; tables of three sizes."""
    scored = [
        _score_case(*case)
        for case in ((128, 4, 1, (0.3, -0.3)), (64, 3, 4, (0.3, -0.3)), (128, 8, 1, (0.0,)), (256, 2, 1, (0.3, -0.3)))
    ]
    return [
        *scored,
        *(_pick_case(columns, count) for columns, count in ((512, 128), (2048, 204), (MOST_COLUMNS, 1024))),
    ]


def _score_case(dim: int, group: int, spans: int, size_weights: tuple[float, ...]) -> CompileCase:
    pointers = {"query": f"*{TRITON_TYPES[torch.bfloat16]}", "codes": "*i8", "scales": "*fp16"}
    pointers |= {"missing": "*u8", "scores": "*fp32"}
    strides = "query_b", "query_h", "codes_row", "scales_row", "missing_row"
    return CompileCase(
        name=f"choose {'quest' if len(size_weights) == 2 else 'landmark'} d{dim} spans={spans}",
        kernel=score_kernel,
        signature=pointers | dict.fromkeys((*strides, "heads", "columns"), "i32"),
        constants=score_constants(dim, group, spans, size_weights, False),
        num_warps=SCORE_WARPS,
        num_stages=1,
        aligned=(*pointers, "query_b", "query_h", "codes_row"),
    )


def _pick_case(columns: int, count: int) -> CompileCase:
    pointers = {"scores": "*fp32", **dict.fromkeys(("limits", "pages", "chosen", "table"), "*i64")}
    constants, warps = pick_constants(columns, count, True)
    return CompileCase(
        name=f"choose {count} of {columns}",
        kernel=pick_kernel,
        signature=pointers | dict.fromkeys(("rows", "capacity", "columns", "count"), "i32"),
        constants=constants,
        num_warps=warps,
        num_stages=1,
        aligned=tuple(pointers),
    )
