"""Attention over pages and over full-precision tokens in Triton: the kernels that ``decode`` and ``extend`` share.

The keys are cut in splits (FlashDecoding). A program takes one split and ``BLOCK_M`` queries of one row, which all read
the same KV head: query ``m`` of a row is query token ``m // GROUP`` of head ``m % GROUP``. It leaves a partial output
and its log-sum-exp, in base 2, for ``combine_kernel``. Scales touch no element where a whole page or row shares them:
those per channel fold into the queries or the outputs, those per token into the scores or the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_kvcache.kernels.triton.sides import (
    channels,
    levels_of,
    load_codes,
    load_elements,
    load_per_channel,
    load_per_token,
    load_table,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
#: What weights are shifted by where a token's scale is 0; the smallest number that half precision has is 2**-24.
SMALLEST_SCALE = tl.constexpr(2.0**-24)


@triton.jit
def locate(rows_m, heads, BLOCK_M: tl.constexpr):
    """Row, sequence, KV head and queries ``[BLOCK_M]`` of this program."""
    blocks = tl.cdiv(rows_m, BLOCK_M)
    row = tl.program_id(0) // blocks
    m = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    return row, row // heads, row % heads, m


@triton.jit
def load_query(query, stride_b, stride_h, stride_q, batch, head, m, rows_m, channel, there, GROUP: tl.constexpr):
    """fp32 queries ``[BLOCK_M, D]``, 0 where there is no query or channel."""
    base = query + batch.to(tl.int64) * stride_b + (head * GROUP).to(tl.int64) * stride_h
    rows = (m % GROUP).to(tl.int64) * stride_h + (m // GROUP).to(tl.int64) * stride_q
    inside = (m < rows_m)[:, None] & there[None, :]
    return tl.load(base + rows[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def normalise(query, side: tl.constexpr):
    """Queries in the type of computation, and what their dot products are to be multiplied by ``[BLOCK_M]``.

    With entries of at most 1, no scale per channel that half precision can hold takes them out of its range.
    """
    peak = tl.full([query.shape[0]], 1.0, tl.float32)
    if side.compute == tl.float16 and side.level != "dense":
        peak = tl.max(tl.abs(query), 1)
        peak = tl.where(peak > 0, peak, 1.0)
        query = query / peak[:, None]
    return query.to(side.compute), peak


@triton.jit
def _page_scores(
    record, query, first, held, table, channel, there, side: tl.constexpr, n: tl.constexpr, masked: tl.constexpr
):
    """fp32 ``[BLOCK_M, BLOCK_N]``: dot products of queries with the keys of a page."""
    if not side.folded:
        keys = load_elements(record, first, held, table, channel, there, side, n, masked)
        return tl.dot(query, tl.trans(keys), input_precision=side.precision)
    else:
        return _folded_scores(record, query, first, held, table, channel, there, side, n, masked)


@triton.jit
def _folded_scores(
    record, query, first, held, table, channel, there, side: tl.constexpr, n: tl.constexpr, masked: tl.constexpr
):
    levels = levels_of(load_codes(record, first, held, side, n, masked), table, side, side.compute)
    scaled = query
    if side.channel or side.other:
        at: tl.constexpr = side.scale_at if side.channel else side.other_at
        scale = load_per_channel(record, at, channel, there, held, side, masked)
        scaled = (query * scale[None, :]).to(side.compute)
    scores = tl.dot(scaled, tl.trans(levels), input_precision=side.precision)
    if side.channel:
        if side.zero:
            zero = load_per_channel(record, side.zero_at, channel, there, held, side, masked)
            scores += tl.sum(query.to(tl.float32) * zero[None, :], 1)[:, None]
        if side.other:
            scores *= load_per_token(record, side.other_at, first, held, n, masked)[None, :]
    else:
        scores *= load_per_token(record, side.scale_at, first, held, n, masked)[None, :]
        if side.zero:
            zero = load_per_token(record, side.zero_at, first, held, n, masked)
            scores += tl.sum(scaled.to(tl.float32), 1)[:, None] * zero[None, :]
    return scores


@triton.jit
def finish_scores(scores, peak, shift, inner, softcap, SOFTCAP: tl.constexpr):
    """Scores in base 2 from dot products of normalised queries."""
    scores = (scores + shift[:, None]) * (peak * inner)[:, None]
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), right at both infinities too.
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2_E)) + 1.0))
    return scores * LOG2_E


@triton.jit
def sees(at, m, window, keep, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """bool ``[BLOCK_M, BLOCK_N]``: what queries see of keys at ``at [BLOCK_N]``, relative to the first query."""
    query_at = (m // GROUP)[:, None]
    seen = keep[None, :]
    if CAUSAL:
        seen = seen & (at[None, :] <= query_at)
    if WINDOW:
        seen = seen & (at[None, :] > query_at - window)
    return seen


@triton.jit
def weigh(scores, height, peak, total):
    """Online softmax: weights, the decay of what came before, the new maximum, and the new sum.

    Args:
        scores: fp32 ``[BLOCK_M, BLOCK_N]`` in base 2, -inf where hidden.
        height: fp32 of the same shape; its maximum becomes 0.
        peak: fp32 ``[BLOCK_M]``, the maximum so far.
        total: fp32 ``[BLOCK_M]``, the sum of the weights so far.
    """
    higher = tl.maximum(peak, tl.max(height, 1))
    # A query that has seen no visible key yet keeps a maximum of -inf, and -inf - -inf is not a number.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
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


@triton.jit(do_not_specialize=["rows", "columns", "per_split", "rows_m", "heads", "window"])
def pages_kernel(
    query,
    stride_b,
    stride_h,
    stride_q,
    pages,
    positions,
    center,
    tables,
    partial,
    partial_lse,
    kept_scores,
    rows,
    columns,
    per_split,
    rows_m,
    heads,
    window,
    inner,
    softcap,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    FULL: tl.constexpr,
    PLACED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CENTERED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEEP_SCORES: tl.constexpr,
):
    """Attention of ``BLOCK_M`` queries of a row over the pages of a split; grid (rows times query blocks, splits).

    Args:
        query: ``[B, Hq, q, Dk]`` in the rotated basis; the last dimension is contiguous.
        stride_b: elements between sequences of the query.
        stride_h: elements between its heads.
        stride_q: elements between its tokens.
        pages: int64 ``[3, rows, columns]``: addresses of the records, token counts, first positions.
        positions: int32 ``[rows, columns, P]``; read if ``PLACED == 2``. Positions are relative to the first query's.
        center: fp32 ``[rows, Dk]``; read if ``CENTERED``.
        tables: fp32 ``[2, 16]``, the levels of keys and values; read where a side has ``level="table"``.
        partial: fp32 ``[splits, rows, rows_m, Dv]``, written, in the rotated basis.
        partial_lse: fp32 ``[splits, rows, rows_m]``, written, in base 2.
        kept_scores: fp32 ``[rows, rows_m, columns * P]``, written if ``KEEP_SCORES``.
        rows: sequences times KV heads.
        columns: pages of a row.
        per_split: pages of a split.
        rows_m: queries of a row, query heads per KV head times query tokens.
        heads: KV heads.
        window: tokens a query sees, itself included; heeded if ``WINDOW``.
        inner: factor of the dot products.
        softcap: soft cap of the scores; heeded if ``SOFTCAP``.
        KEYS: the key side of a page.
        VALUES: the value side.
        GROUP: query heads per KV head.
        BLOCK_M: queries of a program.
        BLOCK_N: tokens of a page that are taken at a time.
        STAGES: depth of the software pipeline.
        FULL: whether every place of every page holds a token.
        PLACED: 0 if all queries see all tokens, 1 if pages hold tokens side by side, 2 if ``positions`` says where.
        CAUSAL: whether a query sees no later token; heeded if ``PLACED``.
        WINDOW: whether there is a sliding window; heeded if ``PLACED``.
        CENTERED: whether a mean was taken out of the keys.
        SOFTCAP: whether scores are capped.
        KEEP_SCORES: whether to write the scores.
    """
    TILES: tl.constexpr = KEYS.page_pad // BLOCK_N
    MASKED: tl.constexpr = not FULL or KEYS.page != KEYS.page_pad
    TOKEN_SCALES: tl.constexpr = VALUES.folded and (not VALUES.channel or VALUES.other)
    row, batch, head, m = locate(rows_m, heads, BLOCK_M)
    split = tl.program_id(1)
    key_channel, key_there = channels(KEYS)
    value_channel, value_there = channels(VALUES)
    key_table = tl.zeros([16], KEYS.compute)
    if KEYS.level == "table":
        key_table = load_table(tables, KEYS)
    value_table = tl.zeros([16], VALUES.compute)
    if VALUES.level == "table":
        value_table = load_table(tables + 16, VALUES)
    q = load_query(query, stride_b, stride_h, stride_q, batch, head, m, rows_m, key_channel, key_there, GROUP)
    q, q_peak = normalise(q, KEYS)
    shift = tl.zeros([BLOCK_M], tl.float32)
    if CENTERED:
        mean = tl.load(center + row * KEYS.dim + key_channel, mask=key_there, other=0.0)
        shift = tl.sum(q.to(tl.float32) * mean[None, :], 1)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    offset = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.full([BLOCK_M, VALUES.segments * VALUES.segment_pad], 0.0, tl.float32)
    last = tl.minimum((split + 1) * per_split, columns)
    for tile in tl.range(split * per_split * TILES, last * TILES, num_stages=STAGES):
        place = row.to(tl.int64) * columns + tile // TILES
        first = tile % TILES * BLOCK_N
        token = first + tl.arange(0, BLOCK_N)
        count = tl.full([], KEYS.page, tl.int32)
        if not FULL:
            count = tl.load(pages + rows.to(tl.int64) * columns + place).to(tl.int32)
        held = count - first
        keep = token < count
        record = tl.multiple_of(tl.load(pages + place).to(tl.pointer_type(tl.uint8)), 16)
        scores = _page_scores(record, q, first, held, key_table, key_channel, key_there, KEYS, BLOCK_N, MASKED)
        scores = finish_scores(scores, q_peak, shift, inner, softcap, SOFTCAP)
        if PLACED > 0:
            if PLACED == 2:
                at = tl.load(positions + place * KEYS.page + token, mask=keep, other=0)
            else:
                at = tl.load(pages + 2 * rows.to(tl.int64) * columns + place).to(tl.int32) + token
            seen = sees(at, m, window, keep, GROUP, CAUSAL, WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        elif MASKED:
            scores = tl.where(keep[None, :], scores, float("-inf"))
        if KEEP_SCORES:
            key = (tile // TILES) * KEYS.page + token
            to = (row.to(tl.int64) * rows_m + m)[:, None] * (columns * KEYS.page) + key[None, :]
            tl.store(kept_scores + to, scores * LN_2, mask=(m < rows_m)[:, None] & (token < KEYS.page)[None, :])
        # Weights times a scale per token must stay in the range of half precision, so it is their product's maximum
        # that becomes 1; the sum of the weights alone is in fp32 and has room.
        height = scores
        token_scale = tl.zeros([BLOCK_N], tl.float32)
        if TOKEN_SCALES:
            if VALUES.channel:
                token_scale = load_per_token(record, VALUES.other_at, first, held, BLOCK_N, MASKED)
            else:
                token_scale = load_per_token(record, VALUES.scale_at, first, held, BLOCK_N, MASKED)
            height = scores + tl.log2(tl.maximum(tl.abs(token_scale), SMALLEST_SCALE))[None, :]
        weights, decay, peak, total = weigh(scores, height, peak, total)
        if VALUES.folded and VALUES.zero and not VALUES.channel and not VALUES.other:
            # Not beside the product, where registers are fewest.
            zero = load_per_token(record, VALUES.zero_at, first, held, BLOCK_N, MASKED)
            if VALUES.middle:
                zero += token_scale * VALUES.middle
            offset = offset * decay + tl.sum(weights * zero[None, :], 1)
        if VALUES.folded:
            levels = levels_of(
                load_codes(record, first, held, VALUES, BLOCK_N, MASKED), value_table, VALUES, VALUES.compute
            )
            scaled = weights
            if TOKEN_SCALES:
                scaled = weights * token_scale[None, :]
            shares = scaled.to(VALUES.compute)
            if VALUES.channel:
                scale = load_per_channel(record, VALUES.scale_at, value_channel, value_there, held, VALUES, MASKED)
                part = tl.dot(shares, levels, input_precision=VALUES.precision) * scale[None, :]
                if VALUES.zero:
                    zero = load_per_channel(record, VALUES.zero_at, value_channel, value_there, held, VALUES, MASKED)
                    if VALUES.middle:
                        zero += scale * VALUES.middle
                    part += tl.sum(scaled, 1)[:, None] * zero[None, :]
                acc = acc * decay[:, None] + part
            elif VALUES.other:
                part = tl.dot(shares, levels, input_precision=VALUES.precision)
                if VALUES.zero:
                    zero = load_per_token(record, VALUES.zero_at, first, held, BLOCK_N, MASKED)
                    if VALUES.middle:
                        zero += token_scale * VALUES.middle
                    part += tl.sum(weights * zero[None, :], 1)[:, None]
                part *= load_per_channel(record, VALUES.other_at, value_channel, value_there, held, VALUES, MASKED)[
                    None, :
                ]
                acc = acc * decay[:, None] + part
            else:
                acc = tl.dot(shares, levels, acc * decay[:, None], input_precision=VALUES.precision)
        else:
            values = load_elements(
                record, first, held, value_table, value_channel, value_there, VALUES, BLOCK_N, MASKED
            )
            shares = weights.to(VALUES.compute)
            acc = tl.dot(shares, values, acc * decay[:, None], input_precision=VALUES.precision)
    acc += offset[:, None]
    store_partial(
        partial, partial_lse, acc, peak, total, row, rows, m, rows_m, split, value_channel, value_there, VALUES.dim
    )


@triton.jit(do_not_specialize=["rows", "slots", "per_split", "rows_m", "heads", "window", "first_split", "start"])
def dense_kernel(
    query,
    stride_b,
    stride_h,
    stride_q,
    keys,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    values,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    positions,
    position_stride,
    unused,
    unused_stride,
    partial,
    partial_lse,
    kept_scores,
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
    PLACED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    UNUSED: tl.constexpr,
    OWN_LAST: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEEP_SCORES: tl.constexpr,
):
    """Attention of ``BLOCK_M`` queries of a row over a split of full-precision tokens.

    Arguments that :func:`pages_kernel` has too mean the same, with the query in the model's basis.

    Args:
        keys: ``[B, Hkv, slots, Dk]``; the last dimension is contiguous. Strides in elements follow.
        values: ``[B, Hkv, slots, Dv]``, likewise.
        positions: int64 ``[B, slots]``; read if ``PLACED``.
        unused: uint8 ``[B, slots]``, 1 where there is no token; read if ``UNUSED``.
        kept_scores: fp32 ``[rows, rows_m, slots]``, written if ``KEEP_SCORES``.
        slots: number of slots.
        per_split: slots of a split, a multiple of ``BLOCK_N``.
        first_split: index of the first split in ``partial``, behind those of the pages.
        start: position of the first query.
        KEY_PAD: ``KEY_DIM`` rounded up to a power of two.
        VALUE_PAD: ``VALUE_DIM`` rounded up to a power of two.
        COMPUTE: type in which dot products take keys and values.
        OWN_LAST: whether the last slots are the queries' own, so that those behind a query's own need not be read.
    """
    row, batch, head, m = locate(rows_m, heads, BLOCK_M)
    split = tl.program_id(1)
    key_channel = tl.arange(0, KEY_PAD)
    key_there = key_channel < KEY_DIM
    value_channel = tl.arange(0, VALUE_PAD)
    value_there = value_channel < VALUE_DIM
    q = load_query(query, stride_b, stride_h, stride_q, batch, head, m, rows_m, key_channel, key_there, GROUP)
    q = q.to(COMPUTE)
    ones = tl.full([BLOCK_M], 1.0, tl.float32)
    none = tl.zeros([BLOCK_M], tl.float32)
    key_base = keys + batch.to(tl.int64) * key_stride_b + head.to(tl.int64) * key_stride_h
    value_base = values + batch.to(tl.int64) * value_stride_b + head.to(tl.int64) * value_stride_h
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE_PAD], tl.float32)
    last = tl.minimum((split + 1) * per_split, slots)
    if OWN_LAST:
        # A block's last query stands at this many slots from the end.
        behind = tl.maximum((rows_m - 1 - tl.max(m, 0)) // GROUP, 0)
        last = tl.minimum(last, slots - behind)
    for first in tl.range(split * per_split, last, BLOCK_N, num_stages=STAGES):
        slot = first + tl.arange(0, BLOCK_N)
        keep = slot < slots
        if UNUSED:
            empty = tl.load(unused + batch.to(tl.int64) * unused_stride + slot, mask=keep, other=1)
            keep = keep & (empty == 0)
        slot64 = slot.to(tl.int64)
        k = tl.load(
            key_base + slot64[:, None] * key_stride_n + key_channel[None, :],
            mask=(slot < slots)[:, None] & key_there[None, :],
            other=0.0,
        )
        scores = tl.dot(q, tl.trans(k.to(COMPUTE)), input_precision=PRECISION)
        scores = finish_scores(scores, ones, none, inner, softcap, SOFTCAP)
        seen = keep[None, :]
        if PLACED:
            at = tl.load(positions + batch.to(tl.int64) * position_stride + slot, mask=keep, other=0) - start
            seen = sees(at, m, window, keep, GROUP, CAUSAL, WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        if KEEP_SCORES:
            to = (row.to(tl.int64) * rows_m + m)[:, None] * slots + slot[None, :]
            tl.store(kept_scores + to, scores * LN_2, mask=(m < rows_m)[:, None] & (slot < slots)[None, :])
        weights, decay, peak, total = weigh(scores, scores, peak, total)
        v = tl.load(
            value_base + slot64[:, None] * value_stride_n + value_channel[None, :],
            # What stands in an unused slot may be anything, and 0 times infinity is not 0.
            mask=keep[:, None] & value_there[None, :],
            other=0.0,
        )
        acc = tl.dot(weights.to(COMPUTE), v.to(COMPUTE), acc * decay[:, None], input_precision=PRECISION)
    split += first_split
    store_partial(
        partial, partial_lse, acc, peak, total, row, rows, m, rows_m, split, value_channel, value_there, VALUE_DIM
    )


@triton.jit
def _share(lse, total):
    """The share of a part in the whole, from both log-sum-exps in base 2."""
    return tl.exp2(lse - tl.where(total == float("-inf"), 0.0, total))


@triton.jit(do_not_specialize=["rows", "rows_m", "heads", "page_splits", "splits"])
def combine_kernel(
    partial,
    partial_lse,
    rotation,
    sinks,
    output,
    log_sum_exp,
    rows,
    rows_m,
    heads,
    page_splits,
    splits,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROTATED: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Merge the splits, the first ``page_splits`` of which are in the rotated basis; grid (rows times query blocks).

    Args:
        partial: fp32 ``[splits, rows, rows_m, DIM]``.
        partial_lse: fp32 ``[splits, rows, rows_m]``, in base 2.
        rotation: fp32 ``[DIM, DIM]``, the rotation of the values; read if ``ROTATED``.
        sinks: a logit per query head, fp32 ``[Hq]``; read if ``SINKS``.
        output: ``[B, q, Hq, DIM]``, written.
        log_sum_exp: fp32 ``[B, Hq, q]``, written.
        DIM_PAD: ``DIM`` rounded up to a power of two.
        CHUNK: channels of the output that are made at a time; ``DIM_PAD`` unless ``ROTATED``.
    """
    row, batch, head, m = locate(rows_m, heads, BLOCK_M)
    inside = m < rows_m
    channel = tl.arange(0, DIM_PAD)
    mask = inside[:, None] & (channel < DIM)[None, :]
    query_head = head * GROUP + m % GROUP
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        peak = tl.load(sinks + query_head, mask=inside, other=0.0) * LOG2_E
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    for split in range(0, splits):
        at = (tl.cast(split, tl.int64) * rows + row) * rows_m + m
        lse = tl.load(partial_lse + at, mask=inside, other=float("-inf"))
        higher = tl.maximum(peak, lse)
        total = total * _share(peak, higher) + _share(lse, higher)
        peak = higher
    some = total > 0
    total = tl.where(some, peak + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)
    for split in range(0, page_splits):
        at = (tl.cast(split, tl.int64) * rows + row) * rows_m + m
        share = _share(tl.load(partial_lse + at, mask=inside, other=float("-inf")), total)
        part = tl.load(partial + at[:, None] * DIM + channel[None, :], mask=mask, other=0.0)
        acc += share[:, None] * part
    query = m // GROUP
    length = rows_m // GROUP
    all_heads = heads * GROUP
    to = ((batch.to(tl.int64) * length + query) * all_heads + query_head)[:, None] * DIM
    for first in range(0, DIM_PAD, CHUNK):
        wide = first + tl.arange(0, CHUNK)
        if ROTATED:
            # [CHUNK, DIM_PAD]: rows of the rotation, since going back is its transpose.
            there = (wide < DIM)[:, None] & (channel < DIM)[None, :]
            matrix = tl.load(rotation + wide[:, None] * DIM + channel[None, :], mask=there, other=0.0)
            result = tl.dot(acc, tl.trans(matrix), input_precision=PRECISION)
        else:
            result = acc
        chunk_mask = inside[:, None] & (wide < DIM)[None, :]
        for split in range(page_splits, splits):
            at = (tl.cast(split, tl.int64) * rows + row) * rows_m + m
            share = _share(tl.load(partial_lse + at, mask=inside, other=float("-inf")), total)
            part = tl.load(partial + at[:, None] * DIM + wide[None, :], mask=chunk_mask, other=0.0)
            result += share[:, None] * part
        tl.store(output + to + wide[None, :], result.to(output.dtype.element_ty), mask=chunk_mask)
    at = (batch.to(tl.int64) * all_heads + query_head) * length + query
    tl.store(log_sum_exp + at, total * LN_2, mask=inside)


@triton.jit(do_not_specialize=["rows_m"])
def sums_kernel(scores, log_sum_exp, sums, rows_m, keys, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """Probabilities of keys, summed over the query tokens of a head; grid (sequences times query heads, key blocks).

    Args:
        scores: fp32 ``[rows, rows_m, keys]``.
        log_sum_exp: fp32 ``[B, Hq, q]``.
        sums: fp32 ``[B, Hq, keys]``, written.
        rows_m: queries of a row.
        keys: number of keys.
    """
    query_head = tl.program_id(0).to(tl.int64)
    key = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    length = rows_m // GROUP
    acc = tl.zeros([BLOCK_N], tl.float32)
    base = scores + (query_head // GROUP * rows_m + query_head % GROUP) * keys
    for query in range(0, length):
        lse = tl.load(log_sum_exp + query_head * length + query)
        lse = tl.where(lse == float("-inf"), 0.0, lse)
        score = tl.load(base + tl.cast(query, tl.int64) * GROUP * keys + key, mask=key < keys, other=float("-inf"))
        acc += tl.exp2((score - lse) * LOG2_E)
    tl.store(sums + query_head * keys + key, acc, mask=key < keys)
