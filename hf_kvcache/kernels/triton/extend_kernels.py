"""Attention of many queries over tokens that come in parts, in Triton: the kernel of ``extend``.

It differs from the kernel over full-precision tokens of :mod:`~hf_kvcache.kernels.triton.attention_kernels` in that it
can go on where an earlier launch over other tokens stopped. So partial results take the same memory for any number of
parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_kvcache.kernels.triton.attention_parts import (
    LOG2_E,
    empty_softmax,
    finish_scores,
    load_query,
    locate,
    locate_slots,
    sees,
    slot_positions,
    store_partial,
    weigh,
    weigh_products,
)


@triton.jit
def load_partial(
    partial, partial_lse, row, rows, m, rows_m, split, channel, there, DIM: tl.constexpr, BLOCK_M: tl.constexpr
):
    """What ``store_partial`` wrote of a split, as the state of a softmax: sums of values, maximum, sum of weights."""
    at = (split.to(tl.int64) * rows + row) * rows_m + m
    peak = tl.load(partial_lse + at, mask=m < rows_m, other=float("-inf"))
    total = tl.where(peak > float("-inf"), 1.0, 0.0)
    mask = (m < rows_m)[:, None] & there[None, :]
    return tl.load(partial + at[:, None] * DIM + channel[None, :], mask=mask, other=0.0), peak, total


@triton.jit(do_not_specialize=["rows", "slots", "per_split", "rows_m", "heads", "window", "first_split", "start"])
def tokens_kernel(
    # Query.
    query,
    # Tokens.
    keys,
    values,
    positions,
    unused,
    # Outputs.
    partial,
    partial_lse,
    # Strides.
    query_b,
    query_h,
    query_q,
    key_b,
    key_h,
    key_n,
    value_b,
    value_h,
    value_n,
    position_b,
    unused_b,
    # Sizes and scoring.
    rows,
    slots,
    per_split,
    rows_m,
    heads,
    window,
    first_split,
    start,
    inner,
    softcap,
    # Constant sizes.
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    # Switches.
    PLACED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    UNUSED: tl.constexpr,
    OWN_LAST: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CONTINUED: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Attention of ``BLOCK_M`` queries of a row over a split of tokens; grid (rows times query blocks, splits).

    Query ``m`` of a row is query token ``m // GROUP`` of query head ``m % GROUP`` of its KV head.

    Args:
        query: ``[B, Hq, q, Dk]`` in the basis of the keys; the last dimension is contiguous.
        keys: ``[B, Hkv, slots, Dk]``; the last dimension is contiguous.
        values: ``[B, Hkv, slots, Dv]``; the last dimension is contiguous.
        positions: int64 ``[B, Hkv, slots]``, ``position_b`` elements between rows; read if ``PLACED``.
        unused: uint8, likewise, 1 where there is no token; read if ``UNUSED``.
        partial: fp32 ``[splits, rows, rows_m, Dv]``, written; read too if ``CONTINUED``.
        partial_lse: fp32 ``[splits, rows, rows_m]``, in base 2, likewise.
        query_b, query_h, query_q: elements between sequences, heads and tokens of the query; likewise of the others.
        position_b, unused_b: elements between sequences of the positions and of ``unused``.
        rows: sequences times KV heads.
        slots: number of slots.
        per_split: slots of a split, a multiple of ``BLOCK_N``.
        rows_m: queries of a row, query heads per KV head times query tokens.
        heads: KV heads.
        window: tokens a query sees, itself included; used if ``WINDOW``.
        first_split: index of the first split in ``partial``.
        start: position of the first query.
        inner: factor of the dot products.
        softcap: soft cap of the scores; used if ``SOFTCAP``.
        KEY_DIM: width of a key; ``KEY_PAD`` is the same, rounded up to a power of two. ``VALUE_DIM``, ``VALUE_PAD``:
            likewise.
        COMPUTE: type in which dot products take keys and values.
        PRECISION: how dot products of fp32 are done.
        GROUP: query heads per KV head.
        BLOCK_M: queries of a program.
        BLOCK_N: slots that are computed at a time.
        STAGES: depth of the software pipeline.
        PLACED: whether positions say what a query sees.
        CAUSAL: whether a query sees no later token; used if ``PLACED``.
        WINDOW: whether there is a sliding window; used if ``PLACED``.
        UNUSED: whether some slots hold no token.
        OWN_LAST: whether the last slots hold the tokens of the queries, so that a query reads none behind its own.
        SOFTCAP: whether scores are capped.
        CONTINUED: whether to go on from what ``partial`` holds.
        PRODUCTS: whether weights are made of dot products, without scores. It needs ``inner > 0`` and no soft cap.
    """
    row, batch, head, m = locate(rows_m, heads, BLOCK_M)
    split = tl.program_id(1)
    to = split + first_split
    key_channel, value_channel = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    key_there, value_there = key_channel < KEY_DIM, value_channel < VALUE_DIM
    q = load_query(query, query_b, query_h, query_q, batch, head, m, rows_m, key_channel, key_there, GROUP)
    q_peak = tl.full([BLOCK_M], 1.0, tl.float32)
    if tl.float16 == COMPUTE:
        # Queries of a model in bfloat16, or rotated ones, may leave the range of half precision.
        q_peak = tl.max(tl.abs(q), 1)
        q_peak = tl.where(q_peak > 0, q_peak, 1.0)
        q = q / q_peak[:, None]
    q = q.to(COMPUTE)
    none = tl.zeros([BLOCK_M], tl.float32)
    factor = q_peak * (inner * LOG2_E)
    key_base = keys + batch.to(tl.int64) * key_b + head.to(tl.int64) * key_h
    value_base = values + batch.to(tl.int64) * value_b + head.to(tl.int64) * value_h
    if CONTINUED:
        acc, peak, total = load_partial(
            partial, partial_lse, row, rows, m, rows_m, to, value_channel, value_there, VALUE_DIM, BLOCK_M
        )
    else:
        peak, total = empty_softmax(BLOCK_M)
        acc = tl.zeros([BLOCK_M, VALUE_PAD], tl.float32)
    last = tl.minimum((split + 1) * per_split, slots)
    if OWN_LAST:
        # The last query of this block is so many slots from the end.
        behind = tl.maximum((rows_m - 1 - tl.max(m, 0)) // GROUP, 0)
        last = tl.minimum(last, slots - behind)
    for first in tl.range(split * per_split, last, BLOCK_N, num_stages=STAGES):
        slot, keep = locate_slots(unused, unused_b, batch, first, slots, BLOCK_N, UNUSED)
        slot64 = slot.to(tl.int64)
        k = tl.load(
            key_base + slot64[:, None] * key_n + key_channel[None, :],
            mask=(slot < slots)[:, None] & key_there[None, :],
            other=0.0,
        )
        scores = tl.dot(q, tl.trans(k.to(COMPUTE)), input_precision=PRECISION)
        if not PRODUCTS:
            scores = finish_scores(scores, q_peak, none, inner, softcap, SOFTCAP)
        seen = keep[None, :]
        if PLACED:
            at = slot_positions(positions, position_b, batch, slot, keep, start)
            seen = sees(at, m, window, keep, GROUP, CAUSAL, WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        if PRODUCTS:
            weights, decay, peak, total = weigh_products(scores, factor, peak, total)
        else:
            weights, decay, peak, total = weigh(scores, scores, peak, total)
        v = tl.load(
            value_base + slot64[:, None] * value_n + value_channel[None, :],
            # An unused slot may hold anything, infinity included, and 0 times infinity is not 0.
            mask=keep[:, None] & value_there[None, :],
            other=0.0,
        )
        acc = tl.dot(weights.to(COMPUTE), v.to(COMPUTE), acc * decay[:, None], input_precision=PRECISION)
    store_partial(
        partial, partial_lse, acc, peak, total, row, rows, m, rows_m, to, value_channel, value_there, VALUE_DIM
    )
