"""What the Triton kernels that choose pages have in common: the columns with the largest scores, and their entries."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_kvcache.kernels.reference.choose import NO_COLUMN

_NO_COLUMN = tl.constexpr(NO_COLUMN)
_LEAST_KEY = tl.constexpr(-(1 << 31))


@triton.jit
def ordered(score, inside):
    """Integers in the order of float32 scores; below all of them where not ``inside``."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(inside, bits ^ ((bits >> 31) & 0x7FFFFFFF), _LEAST_KEY)


@triton.jit
def smallest_of_largest(key, most):
    """The smallest of the ``most`` largest of the integers ``key [n]``, found bit by bit."""
    one = tl.full([], 1, tl.int32)
    least = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= most, one * 0, one * _LEAST_KEY)
    for bit in range(31):
        candidate = least | (one << (30 - bit))
        enough = tl.sum((key >= candidate).to(tl.int32), 0) >= most
        least = tl.where(enough, candidate, least)
    return least


@triton.jit
def largest(key, inside, most):
    """Whether each of ``key [n]`` is one of the ``most`` largest; of equal ones those that come first are."""
    least = smallest_of_largest(key, most)
    greater, equal = key > least, inside & (key == least)
    left = most - tl.sum(greater.to(tl.int32), 0)
    return greater | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))


@triton.jit
def write_entries(picked, column, pages, chosen, table, row, rows, capacity, count, COUNT_PAD: tl.constexpr):
    """Write the columns of a row that are ``picked``, and what the table of all pages says of them.

    Args:
        picked: bool ``[COLUMNS_PAD]``, at most ``count`` of them.
        column: numbers of the columns.
        pages: int64 ``[3, rows, capacity]``, the table of all pages.
        chosen: int64 ``[rows, count]``, written: columns, ascending, then ``NO_COLUMN`` where there are fewer.
        table: int64 ``[3, rows, count]``, written: what ``pages`` says of them, then 0.
        row: int64.
    """
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
