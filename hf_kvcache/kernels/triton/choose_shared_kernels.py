"""The Triton kernels that choose the pages of a decode step where the KV heads of a sequence share them."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.inputs import MassRule
from hf_kvcache.kernels.triton.choose_columns import largest, ordered, smallest_of_largest, write_entries
from hf_kvcache.kernels.triton.choose_kernels import MOST_COLUMNS, column_pads, pick_warps
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.sides import TRITON_TYPES

#: Columns of all heads of a sequence that one program can choose from, each head's number rounded up to a power of two.
MOST_CELLS = 16384


@triton.jit
def _among_sinks(query, query_h, sinks, m, DIM, DIM_PAD: tl.constexpr, SINKS, SINKS_PAD: tl.constexpr, SCALING):
    """The products of query ``m`` of a row with the keys of its sinks, scaled; ``-inf`` behind the last of them."""
    channel, sink = tl.arange(0, DIM_PAD), tl.arange(0, SINKS_PAD)
    one = tl.load(query + m * query_h + channel, mask=channel < DIM, other=0.0).to(tl.float32)
    at = sinks + sink[:, None] * DIM + channel[None, :]
    keys = tl.load(at, mask=(sink < SINKS)[:, None] & (channel < DIM)[None, :], other=0.0)
    return tl.where(sink < SINKS, tl.sum(keys * one[None, :], 1) * SCALING, float("-inf"))


@triton.jit(do_not_specialize=["heads", "columns", "count"])
def candidate_kernel(
    query,
    scores,
    sinks,
    limits,
    candidates,
    query_b,
    query_h,
    heads,
    columns,
    count,
    LIMITED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    SPANS: tl.constexpr,
    SINKS: tl.constexpr,
    SINKS_PAD: tl.constexpr,
    SCALING: tl.constexpr,
    PART_LOG: tl.constexpr,
    COLUMNS_PAD: tl.constexpr,
):
    """The probabilities of the pages of a row among pages and sinks, summed over its query heads; grid (rows).

    Only the largest are written, twice as many as the row brings to those that the heads share, else ``-inf``.

    Args:
        query: ``[B, Hq, DIM]``, with strides ``query_b`` and ``query_h``.
        scores: fp32 ``[rows, GROUP, columns * SPANS]``, what ``mass_kernel`` has written.
        sinks: fp32 ``[rows, SINKS, DIM]``, their keys.
        limits: int64 ``[rows]``, how many pages a row brings, but at most ``count``; read if ``LIMITED``.
        candidates: fp32 ``[rows, columns]``, written.
        heads: KV heads of a sequence.
        columns: columns of the table.
        count: how many pages a row brings unless ``LIMITED``.
        PART_LOG: the logarithm of the tokens of a part.
    """
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS_PAD)
    inside, parts = column < columns, columns * SPANS
    asked = query + row // heads * query_b + row % heads * GROUP * query_h
    total, held = tl.zeros([COLUMNS_PAD], tl.float32), inside
    for m in range(GROUP):
        at = scores + (row * GROUP + m) * parts + column * SPANS
        top = tl.full([COLUMNS_PAD], float("-inf"), tl.float32)
        for part in range(SPANS):
            top = tl.maximum(top, tl.load(at + part, mask=inside, other=float("-inf")))
        held = top > float("-inf")
        most = tl.max(top, 0)
        if SINKS > 0:
            known = _among_sinks(asked, query_h, sinks + row * SINKS * DIM, m, DIM, DIM_PAD, SINKS, SINKS_PAD, SCALING)
            known -= PART_LOG
            most = tl.maximum(most, tl.max(known, 0))
        most = tl.where(most > float("-inf"), most, 0.0)
        mass = tl.zeros([COLUMNS_PAD], tl.float32)
        for part in range(SPANS):
            mass += tl.exp(tl.load(at + part, mask=inside, other=float("-inf")) - most)
        of_all = tl.sum(mass, 0)
        if SINKS > 0:
            of_all += tl.sum(tl.exp(known - most), 0)
        total += mass / tl.where(of_all > 0, of_all, 1.0)
    score = tl.where(held, total, float("-inf"))
    own = count
    if LIMITED:
        own = tl.minimum(tl.load(limits + row), count).to(tl.int32)
    picked = largest(ordered(score, inside), inside, tl.minimum(2 * own, columns))
    tl.store(candidates + row * columns + column, tl.where(picked, score, float("-inf")), mask=inside)


@triton.jit(do_not_specialize=["rows", "heads", "capacity", "columns", "count", "width"])
def pick_shared_kernel(
    candidates,
    limits,
    pages,
    chosen,
    table,
    rows,
    heads,
    capacity,
    columns,
    count,
    width,
    LIMITED: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    COLUMNS_PAD: tl.constexpr,
    COUNT_PAD: tl.constexpr,
):
    """The pages of a row that are among the largest scores of all heads of its sequence; grid (rows).

    As many are chosen as the heads may have together, of equal ones those of the first heads, and of one head those
    that come first. Every program looks at the scores of all heads, and writes what its own row has.

    Args:
        candidates: fp32 ``[rows, columns]``, what :func:`candidate_kernel` has written.
        limits: as there, like ``count``.
        pages: int64 ``[3, rows, capacity]``, the table of all pages.
        chosen: int64 ``[rows, width]``, written: columns, ascending, then ``NO_COLUMN`` where there are fewer.
        table: int64 ``[3, rows, width]``, written: what ``pages`` says of them, then 0.
    """
    row = tl.program_id(0).to(tl.int64)
    head, first = (row % heads).to(tl.int32), row // heads * heads
    cell = tl.arange(0, HEADS_PAD * COLUMNS_PAD)
    other, place = cell // COLUMNS_PAD, cell % COLUMNS_PAD
    there = (other < heads) & (place < columns)
    every = tl.load(candidates + (first + other) * columns + place, mask=there, other=float("-inf"))
    key = ordered(every, there)
    together = heads * count
    if LIMITED:
        index = tl.arange(0, HEADS_PAD)
        together = tl.sum(tl.minimum(tl.load(limits + first + index, mask=index < heads, other=0), count), 0)
        together = together.to(tl.int32)
    least = smallest_of_largest(key, together)
    left = together - tl.sum((key > least).to(tl.int32), 0)
    left -= tl.sum((there & (key == least) & (other < head)).to(tl.int32), 0)
    column = tl.arange(0, COLUMNS_PAD)
    inside = column < columns
    score = tl.load(candidates + row * columns + column, mask=inside, other=float("-inf"))
    own = ordered(score, inside)
    equal = inside & (own == least)
    picked = (own > least) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))
    picked = picked & (score > float("-inf"))
    write_entries(picked, column, pages, chosen, table, row, rows, capacity, width, COUNT_PAD)


def candidate_constants(
    dim: int, group: int, spans: int, rule: MassRule, sinks: int, tokens: int, columns: int, limited: bool
) -> dict[str, Any]:
    """The constants of :func:`candidate_kernel`, for parts of so many ``tokens``."""
    return {
        "LIMITED": limited,
        "DIM": dim,
        "DIM_PAD": triton.next_power_of_2(dim),
        "GROUP": group,
        "SPANS": spans,
        "SINKS": sinks,
        "SINKS_PAD": triton.next_power_of_2(max(1, sinks)),
        "SCALING": rule.scaling,
        "PART_LOG": math.log(tokens),
        "COLUMNS_PAD": column_pads(columns, columns)["COLUMNS_PAD"],
    }


def shared_constants(heads: int, columns: int, width: int, limited: bool) -> tuple[dict[str, Any], int]:
    """The constants of :func:`pick_shared_kernel`, and its warps."""
    padded = triton.next_power_of_2(heads)
    pads = column_pads(columns, width)
    return {"LIMITED": limited, "HEADS_PAD": padded, **pads}, pick_warps(padded * pads["COLUMNS_PAD"])


def fits(heads: int, columns: int) -> bool:
    """Whether one program can choose from the columns of all heads of a sequence."""
    return triton.next_power_of_2(heads) * column_pads(columns, columns)["COLUMNS_PAD"] <= MOST_CELLS


def compile_cases(architecture: str) -> list[CompileCase]:
    """Heads of 128 and 64, whole pages and parts; tables of two sizes for three KV heads, and for eight."""
    del architecture
    sized = [_candidate_case(64, 3, 2, 512), _candidate_case(128, 4, 2, MOST_COLUMNS)]
    return [*sized, _pick_case(3, 512, 240), _pick_case(3, 2048, 408), _pick_case(8, 2048, 408)]


def _candidate_case(dim: int, group: int, spans: int, columns: int) -> CompileCase:
    pointers = {"query": f"*{TRITON_TYPES[torch.bfloat16]}", "scores": "*fp32", "sinks": "*fp32", "limits": "*i64"}
    pointers |= {"candidates": "*fp32"}
    return CompileCase(
        name=f"choose candidates of {columns} d{dim} spans={spans}",
        kernel=candidate_kernel,
        signature=pointers | dict.fromkeys(("query_b", "query_h", "heads", "columns", "count"), "i32"),
        constants=candidate_constants(dim, group, spans, MassRule(0.125, 1.77), 4, 16, columns, False),
        num_warps=pick_warps(columns),
        num_stages=1,
        aligned=(*pointers, "query_b", "query_h"),
    )


def _pick_case(heads: int, columns: int, width: int) -> CompileCase:
    pointers = {"candidates": "*fp32", **dict.fromkeys(("limits", "pages", "chosen", "table"), "*i64")}
    constants, warps = shared_constants(heads, columns, width, True)
    return CompileCase(
        name=f"choose {width} of {columns} among {heads} heads",
        kernel=pick_shared_kernel,
        signature=pointers | dict.fromkeys(("rows", "heads", "capacity", "columns", "count", "width"), "i32"),
        constants=constants,
        num_warps=warps,
        num_stages=1,
        aligned=tuple(pointers),
    )
