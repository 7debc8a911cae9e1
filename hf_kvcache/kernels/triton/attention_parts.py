"""The parts that the attention kernels over keys and values and the kernels over latents share.

The keys are cut into splits (FlashDecoding). A program computes one split for ``BLOCK_M`` queries of one row, which all
read the same KV head: query ``m`` of a row is query token ``m // GROUP`` of query head ``m % GROUP``. It writes a
partial output and the log-sum-exp of the split, in base 2. Pages and full-precision tokens are in different splits.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
#: Stands for the scale of a token whose scale is 0, when weights are shifted by its logarithm: the smallest number
#: above 0 in half precision.
SMALLEST_SCALE = tl.constexpr(2.0**-24)


@triton.jit
def locate(rows_m, heads, BLOCK_M: tl.constexpr):
    """The row, the sequence, the KV head and the queries ``[BLOCK_M]`` of this program."""
    blocks = tl.cdiv(rows_m, BLOCK_M)
    row = tl.program_id(0) // blocks
    m = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    return row, row // heads, row % heads, m


@triton.jit
def load_query(query, query_b, query_h, query_q, batch, head, m, rows_m, channel, there, GROUP: tl.constexpr):
    """The queries as fp32 ``[BLOCK_M, D]``, 0 where there is no query or no channel."""
    base = query + batch.to(tl.int64) * query_b + (head * GROUP).to(tl.int64) * query_h
    rows = (m % GROUP).to(tl.int64) * query_h + (m // GROUP).to(tl.int64) * query_q
    inside = (m < rows_m)[:, None] & there[None, :]
    return tl.load(base + rows[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def normalize(query, side: tl.constexpr):
    """Queries in the type of computation, and the factors ``[BLOCK_M]`` of their dot products.

    In half precision the queries are divided by their largest entries. With entries of at most 1, their products with
    scales per channel stay in the range of half precision.
    """
    peak = tl.full([query.shape[0]], 1.0, tl.float32)
    if side.compute == tl.float16 and side.level != "dense":
        peak = tl.max(tl.abs(query), 1)
        peak = tl.where(peak > 0, peak, 1.0)
        query = query / peak[:, None]
    return query.to(side.compute), peak


@triton.jit
def empty_softmax(BLOCK_M: tl.constexpr):
    """The maximum and the sum of weights of :func:`weigh` before the first key, ``[BLOCK_M]`` each."""
    return tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)


@triton.jit
def locate_tokens(pages, row, rows, columns, tile, side: tl.constexpr, BLOCK_N: tl.constexpr, FULL: tl.constexpr):
    """Block ``tile`` of ``BLOCK_N`` tokens of a row's pages.

    Returns:
        The place of the page in ``[rows, columns]``, the first token, the tokens ``[BLOCK_N]``, how many of them count,
        and which of them count ``[BLOCK_N]``.
    """
    TILES: tl.constexpr = side.page_pad // BLOCK_N
    place = row.to(tl.int64) * columns + tile // TILES
    first = tile % TILES * BLOCK_N
    token = first + tl.arange(0, BLOCK_N)
    count = tl.full([], side.page, tl.int32)
    if not FULL:
        count = tl.load(pages + rows.to(tl.int64) * columns + place).to(tl.int32)
    return place, first, token, count - first, token < count


@triton.jit
def entry_of(entries, tile, end, TILES: tl.constexpr):
    """A row's entry of the page table, for block ``tile`` of ``TILES`` in a page; of the last block before ``end``.

    A loop asks for that of its next block and keeps it, in two registers. So loads from pages wait for no other load,
    and a pipeline of two stages has all of them under way a block ahead. With a third stage, entries pass through
    shared memory, which takes some twenty instructions a block. If there is no block, the entry is 0.
    """
    return tl.load(entries + tl.minimum(tile, end - 1) // TILES, mask=end > 0, other=0)


@triton.jit
def record_at(entry):
    """The record whose address an entry of the page table is."""
    return tl.multiple_of(entry.to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def page_positions(pages, positions, place, rows, columns, token, keep, side: tl.constexpr, PLACED: tl.constexpr):
    """Positions ``[BLOCK_N]`` of the tokens of a page."""
    if PLACED == 2:
        return tl.load(positions + place * side.page + token, mask=keep, other=0)
    else:
        return tl.load(pages + 2 * rows.to(tl.int64) * columns + place).to(tl.int32) + token


@triton.jit
def locate_slots(unused, unused_b, batch, first, slots, BLOCK_N: tl.constexpr, UNUSED: tl.constexpr):
    """The slots ``[BLOCK_N]`` from ``first`` on, and which of them hold a token."""
    slot = first + tl.arange(0, BLOCK_N)
    keep = slot < slots
    if UNUSED:
        empty = tl.load(unused + batch.to(tl.int64) * unused_b + slot, mask=keep, other=1)
        keep = keep & (empty == 0)
    return slot, keep


@triton.jit
def slot_positions(positions, position_b, batch, slot, keep, start):
    """Positions ``[BLOCK_N]`` of the tokens in slots, relative to the first query."""
    return tl.load(positions + batch.to(tl.int64) * position_b + slot, mask=keep, other=0) - start


@triton.jit
def finish_scores(scores, peak, shift, inner, softcap, SOFTCAP: tl.constexpr):
    """Scores in base 2 from dot products of normalized queries."""
    scores = (scores + shift[:, None]) * (peak * (inner * LOG2_E))[:, None]
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), which is right at both infinities too.
        scores = (softcap * LOG2_E) * (1.0 - 2.0 / (tl.exp2(scores * 2.0) + 1.0))
    return scores


@triton.jit
def sees(at, m, window, keep, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """bool ``[BLOCK_M, BLOCK_N]``: whether queries see keys at ``at [BLOCK_N]``, relative to the first query."""
    query_at = (m // GROUP)[:, None]
    seen = keep[None, :]
    if CAUSAL:
        seen = seen & (at[None, :] <= query_at)
    if WINDOW:
        seen = seen & (at[None, :] > query_at - window)
    return seen


@triton.jit
def rough_log2(x):
    """The logarithm of positive fp32 numbers in base 2, up to 0.09 too small.

    The bits of a number are its exponent and, behind it, its mantissa: read as an integer they are the logarithm with
    straight lines between powers of two. It takes two instructions; exact logarithms take twenty.
    """
    return x.to(tl.int32, bitcast=True).to(tl.float32) * (2.0**-23) - 127.0


@triton.jit
def weigh(scores, height, peak, total, hidden: tl.constexpr = True):
    """A step of the online softmax: weights, the decay of the earlier sums, the new maximum, the new sum of weights.

    Args:
        scores: fp32 ``[BLOCK_M, BLOCK_N]`` in base 2, -inf where hidden.
        height: fp32 of the same shape; the maximum is that of these numbers.
        peak: fp32 ``[BLOCK_M]``, the maximum so far.
        total: fp32 ``[BLOCK_M]``, the sum of the weights so far; or ``[BLOCK_M, BLOCK_N]``, the sums of the weights at
            each place of a block. Then the threads need not exchange their sums at every step.
        hidden: whether scores may be -inf.
    """
    higher = tl.maximum(peak, tl.max(height, 1))
    base = higher
    if hidden:
        # Before its first visible key a query has a maximum of -inf, and -inf - -inf is not a number.
        base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(peak - base)
    if len(total.shape) == 2:
        return weights, decay, higher, total * decay[:, None] + weights
    else:
        return weights, decay, higher, total * decay + tl.sum(weights, 1)


@triton.jit
def weigh_products(products, factor, peak, total):
    """:func:`weigh` of dot products whose scores are ``products * factor``; it makes no scores but for the largest.

    Args:
        products: fp32 ``[BLOCK_M, BLOCK_N]``, -inf where hidden.
        factor: fp32 ``[BLOCK_M]``, above 0.
        peak: fp32 ``[BLOCK_M]``, the largest score so far.
        total: fp32 ``[BLOCK_M]``, the sum of the weights so far.
    """
    higher = tl.maximum(peak, tl.max(products, 1) * factor)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(products * factor[:, None] - base[:, None])
    decay = tl.exp2(peak - base)
    return weights, decay, higher, total * decay + tl.sum(weights, 1)


@triton.jit
def store_partial(
    partial, partial_lse, acc, peak, total, row, rows, m, rows_m, split, channel, there, DIM: tl.constexpr
):
    """Write the output ``[BLOCK_M, D]`` and log-sum-exp of this split."""
    some = total > 0
    total = tl.where(some, total, 1.0)
    at = (split.to(tl.int64) * rows + row) * rows_m + m
    tl.store(partial_lse + at, tl.where(some, peak + tl.log2(total), float("-inf")), mask=m < rows_m)
    output = acc / total[:, None]
    tl.store(partial + at[:, None] * DIM + channel[None, :], output, mask=(m < rows_m)[:, None] & there[None, :])
