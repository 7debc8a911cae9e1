"""Attention over pages and over full-precision tokens in Triton: the kernels of ``decode`` and ``extend``.

:mod:`~hf_kvcache.kernels.triton.attention_parts` describes how the work is divided. ``combine_kernel`` merges the
partial results and rotates the output back. Scales that a whole page or row shares apply to no element: scales per
channel fold into the queries or the outputs, scales per token into the scores or the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_kvcache.kernels.triton.attention_parts import (
    LN_2,
    LOG2_E,
    SMALLEST_SCALE,
    empty_softmax,
    entry_of,
    finish_scores,
    load_query,
    locate,
    locate_slots,
    locate_tokens,
    normalize,
    page_positions,
    record_at,
    rough_log2,
    sees,
    slot_positions,
    store_partial,
    weigh,
    weigh_products,
)
from hf_kvcache.kernels.triton.elements import load_elements
from hf_kvcache.kernels.triton.sides import (
    channels,
    load_levels,
    load_per_channel,
    load_per_token,
    load_table,
)


@triton.jit
def _dot_keys(query, keys, side: tl.constexpr):
    """fp32 ``[BLOCK_M, BLOCK_N]``: dot products of queries ``[BLOCK_M, D]`` with keys ``[BLOCK_N, D]``.

    Matrix instructions take 16 rows and 8 columns at a time. So few queries are the columns.
    """
    if query.shape[0] < 16:
        return tl.trans(tl.dot(keys, tl.trans(query), input_precision=side.precision))
    else:
        return tl.dot(query, tl.trans(keys), input_precision=side.precision)


@triton.jit
def _dot_values(weights, values, acc, side: tl.constexpr):
    """fp32 ``[BLOCK_M, D]``: ``acc`` and the sums of values ``[BLOCK_N, D]`` by weights ``[BLOCK_M, BLOCK_N]``."""
    if weights.shape[0] < 16:
        return tl.trans(tl.dot(tl.trans(values), tl.trans(weights), tl.trans(acc), input_precision=side.precision))
    else:
        return tl.dot(weights, values, acc, input_precision=side.precision)


@triton.jit
def _page_scores(
    record, query, first, held, table, channel, there, side: tl.constexpr, n: tl.constexpr, masked: tl.constexpr
):
    """fp32 ``[BLOCK_M, BLOCK_N]``: dot products of queries with the keys of a page, divided by ``product_unit``."""
    if not side.folded:
        keys = load_elements(record, first, held, table, channel, there, side, n, masked)
        return _dot_keys(query, keys, side)
    else:
        return _folded_scores(record, query, first, held, table, channel, there, side, n, masked)


@triton.jit
def _folded_scores(
    record, query, first, held, table, channel, there, side: tl.constexpr, n: tl.constexpr, masked: tl.constexpr
):
    levels = load_levels(record, first, held, table, side, n, masked)
    scaled = query
    if side.channel or side.other:
        at: tl.constexpr = side.scale_at if side.channel else side.other_at
        scale = load_per_channel(record, at, channel, there, held, side, masked)
        scaled = (query * scale[None, :]).to(side.compute)
    scores = _dot_keys(scaled, levels, side)
    if side.channel:
        if side.zero:
            # Divided by the unit, with which it is multiplied below: that is one number a query, not one a channel.
            zero = load_per_channel(record, side.zero_at, channel, there, held, side, masked)
            scores += (tl.sum(query.to(tl.float32) * zero[None, :], 1) * (1.0 / side.unit))[:, None]
        if side.other:
            scores *= load_per_token(record, side.other_at, first, held, n, masked)[None, :]
    else:
        scores *= load_per_token(record, side.scale_at, first, held, n, masked)[None, :]
        if side.zero:
            zero = load_per_token(record, side.zero_at, first, held, n, masked) * (1.0 / side.unit)
            scores += tl.sum(scaled.to(tl.float32), 1)[:, None] * zero[None, :]
    return scores


@triton.jit
def _add_values(
    acc,
    decay,
    weights,
    token_scale,
    record,
    first,
    held,
    table,
    channel,
    there,
    side: tl.constexpr,
    n: tl.constexpr,
    masked: tl.constexpr,
):
    """fp32 ``[BLOCK_M, D]``: ``acc``, times its decay, and the weighted sums of the values of a page, by ``sum_unit``.

    Zero points per token without a second scale are not included: :func:`pages_kernel` adds them at the end.
    """
    if not side.folded:
        values = load_elements(record, first, held, table, channel, there, side, n, masked)
        return _dot_values(weights.to(side.compute), values, acc * decay[:, None], side)
    else:
        return _add_folded_values(
            acc, decay, weights, token_scale, record, first, held, table, channel, there, side, n, masked
        )


@triton.jit
def _add_folded_values(
    acc,
    decay,
    weights,
    token_scale,
    record,
    first,
    held,
    table,
    channel,
    there,
    side: tl.constexpr,
    n: tl.constexpr,
    masked: tl.constexpr,
):
    levels = load_levels(record, first, held, table, side, n, masked)
    none = tl.zeros_like(acc)
    scaled = weights
    if side.channel:
        if side.other:
            scaled = weights * token_scale[None, :]
    else:
        scaled = weights * token_scale[None, :]
    shares = scaled.to(side.compute)
    if side.channel:
        scale = load_per_channel(record, side.scale_at, channel, there, held, side, masked)
        part = _dot_values(shares, levels, none, side) * (scale * side.unit)[None, :]
        if side.zero:
            zero = load_per_channel(record, side.zero_at, channel, there, held, side, masked)
            if side.middle:
                zero += scale * side.middle
            part += tl.sum(scaled, 1)[:, None] * zero[None, :]
        return acc * decay[:, None] + part
    elif side.other:
        part = _dot_values(shares, levels, none, side)
        if side.zero:
            zero = load_per_token(record, side.zero_at, first, held, n, masked)
            if side.middle:
                zero += token_scale * side.middle
            part += tl.sum(weights * zero[None, :], 1)[:, None]
        part *= load_per_channel(record, side.other_at, channel, there, held, side, masked)[None, :]
        return acc * decay[:, None] + part
    else:
        return _dot_values(shares, levels, acc * decay[:, None], side)


@triton.jit(do_not_specialize=["rows", "columns", "capacity", "start", "per_split", "rows_m", "heads", "window"])
def pages_kernel(
    # Query.
    query,
    # Pages.
    pages,
    positions,
    key_mean,
    tables,
    # Outputs.
    partial,
    partial_lse,
    kept_scores,
    # Strides of the query.
    query_b,
    query_h,
    query_q,
    # Sizes and scoring.
    rows,
    columns,
    capacity,
    start,
    per_split,
    rows_m,
    heads,
    window,
    inner,
    softcap,
    # Constant sizes.
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    # Switches.
    FULL: tl.constexpr,
    PLACED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CENTERED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEEP_SCORES: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Attention of ``BLOCK_M`` queries of a row over the pages of a split; grid (rows times query blocks, splits).

    Args:
        query: ``[B, Hq, q, Dk]`` in the rotated basis; the last dimension is contiguous.
        pages: int64 ``[3, rows, capacity]``: addresses of the records, token counts, first positions.
        positions: int32 ``[rows, capacity, P]``; read if ``PLACED == 2``.
        key_mean: fp32 ``[rows, Dk]``; read if ``CENTERED``.
        tables: fp32 ``[2, 16]``, the levels of keys and values; read where a side has ``level="table"``.
        partial: fp32 ``[splits, rows, rows_m, Dv]``, written, in the rotated basis.
        partial_lse: fp32 ``[splits, rows, rows_m]``, written, in base 2.
        kept_scores: fp32 ``[rows, rows_m, columns * P]``, written if ``KEEP_SCORES``.
        query_b, query_h, query_q: elements between sequences, heads and tokens of the query.
        rows: sequences times KV heads.
        columns: pages of a row.
        capacity: the distance between rows of the table.
        start: position of the first query.
        per_split: pages of a split.
        rows_m: queries of a row, query heads per KV head times query tokens.
        heads: KV heads.
        window: tokens a query sees, itself included; used if ``WINDOW``.
        inner: factor of the dot products.
        softcap: soft cap of the scores; used if ``SOFTCAP``.
        KEYS: the key side of a page.
        VALUES: the value side.
        GROUP: query heads per KV head.
        BLOCK_M: queries of a program.
        BLOCK_N: tokens of a page that are computed at a time.
        STAGES: depth of the software pipeline. With three stages and more, addresses of pages are a stage too.
        FULL: whether every place of every page holds a token.
        PLACED: 0 if all queries see all tokens, 1 if pages hold tokens side by side, 2 if ``positions`` says where.
        CAUSAL: whether a query sees no later token; used if ``PLACED``.
        WINDOW: whether there is a sliding window; used if ``PLACED``.
        CENTERED: whether a key mean was subtracted from the keys.
        SOFTCAP: whether scores are capped.
        KEEP_SCORES: whether to write the scores.
        PRODUCTS: whether weights are made of dot products, without scores. What the key mean adds is the same for all
            tokens of pages, and is then added at the end. It needs ``inner > 0``, and neither a soft cap, a bias,
            scores to write nor scales that are folded into weights.
    """
    TILES: tl.constexpr = KEYS.page_pad // BLOCK_N
    MASKED: tl.constexpr = not FULL or KEYS.page != KEYS.page_pad
    TOKEN_SCALES: tl.constexpr = VALUES.folded and (not VALUES.channel or VALUES.other)
    row, batch, head, m = locate(rows_m, heads, BLOCK_M)
    split = tl.program_id(1)
    key_channel, key_there = channels(KEYS)
    value_channel, value_there = channels(VALUES)
    key_table, value_table = load_table(tables, KEYS), load_table(tables + 16, VALUES)
    q = load_query(query, query_b, query_h, query_q, batch, head, m, rows_m, key_channel, key_there, GROUP)
    q, q_peak = normalize(q, KEYS)
    shift = tl.zeros([BLOCK_M], tl.float32)
    if CENTERED:
        mean = tl.load(key_mean + row * KEYS.dim + key_channel, mask=key_there, other=0.0)
        shift = tl.sum(q.to(tl.float32) * mean[None, :], 1) * (1.0 / KEYS.product_unit)
    q_peak *= KEYS.product_unit
    peak, total = empty_softmax(BLOCK_M)
    if BLOCK_M < 16:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    factor = q_peak * (inner * LOG2_E)
    offset = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.full([BLOCK_M, VALUES.segments * VALUES.segment_pad], 0.0, tl.float32)
    begin = split * per_split * TILES
    end = tl.minimum((split + 1) * per_split, columns) * TILES
    entries = pages + row.to(tl.int64) * capacity
    entry = entry_of(entries, begin, end, TILES)
    for tile in tl.range(begin, end, num_stages=STAGES):
        if STAGES > 2:
            record = record_at(tl.load(entries + tile // TILES))
        else:
            record = record_at(entry)
            entry = entry_of(entries, tile + 1, end, TILES)
        place, first, token, held, keep = locate_tokens(pages, row, rows, capacity, tile, KEYS, BLOCK_N, FULL)
        scores = _page_scores(record, q, first, held, key_table, key_channel, key_there, KEYS, BLOCK_N, MASKED)
        if not PRODUCTS:
            scores = finish_scores(scores, q_peak, shift, inner, softcap, SOFTCAP)
        if KEYS.bias_at:
            scores += (load_per_token(record, KEYS.bias_at, first, held, BLOCK_N, MASKED) * LOG2_E)[None, :]
        if PLACED > 0:
            at = page_positions(pages, positions, place, rows, capacity, token, keep, KEYS, PLACED) - start
            seen = sees(at, m, window, keep, GROUP, CAUSAL, WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        elif MASKED:
            scores = tl.where(keep[None, :], scores, float("-inf"))
        if KEEP_SCORES:
            key = (tile // TILES) * KEYS.page + token
            to = (row.to(tl.int64) * rows_m + m)[:, None] * (columns * KEYS.page) + key[None, :]
            tl.store(kept_scores + to, scores * LN_2, mask=(m < rows_m)[:, None] & (token < KEYS.page)[None, :])
        # Weights times a scale per token must stay in the range of half precision. So the maximum of their product
        # becomes 1; the sum of the weights alone is in fp32, whose range is larger.
        height = scores
        token_scale = tl.zeros([BLOCK_N], tl.float32)
        if TOKEN_SCALES:
            if VALUES.channel:
                token_scale = load_per_token(record, VALUES.other_at, first, held, BLOCK_N, MASKED)
            else:
                token_scale = load_per_token(record, VALUES.scale_at, first, held, BLOCK_N, MASKED)
            height = scores + rough_log2(tl.maximum(tl.abs(token_scale), SMALLEST_SCALE))[None, :]
        if PRODUCTS:
            weights, decay, peak, total = weigh_products(scores, factor, peak, total)
        else:
            weights, decay, peak, total = weigh(scores, height, peak, total, PLACED > 0 or MASKED or KEYS.bias_at > 0)
        if VALUES.folded and VALUES.zero and not VALUES.channel and not VALUES.other:
            # Here and not at the dot product, where most registers are in use.
            zero = load_per_token(record, VALUES.zero_at, first, held, BLOCK_N, MASKED)
            if VALUES.middle:
                zero += token_scale * VALUES.middle
            offset = offset * decay + tl.sum(weights * zero[None, :], 1)
        acc = _add_values(
            acc,
            decay,
            weights,
            token_scale,
            record,
            first,
            held,
            value_table,
            value_channel,
            value_there,
            VALUES,
            BLOCK_N,
            MASKED,
        )
    acc = acc * VALUES.sum_unit + offset[:, None]
    if PRODUCTS:
        peak += shift * factor
    if BLOCK_M < 16:
        total = tl.sum(total, 1)
    store_partial(
        partial, partial_lse, acc, peak, total, row, rows, m, rows_m, split, value_channel, value_there, VALUES.dim
    )


@triton.jit(do_not_specialize=["rows", "slots", "per_split", "rows_m", "heads", "window", "first_split", "start"])
def dense_kernel(
    # Query.
    query,
    # Full-precision tokens.
    keys,
    values,
    positions,
    unused,
    # Outputs.
    partial,
    partial_lse,
    kept_scores,
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
    KEEP_SCORES: tl.constexpr,
):
    """Attention of ``BLOCK_M`` queries of a row over a split of full-precision tokens.

    The query is in the model's basis. All other arguments are described here or in :func:`pages_kernel`.

    Args:
        keys: ``[B, Hkv, slots, Dk]``; the last dimension is contiguous.
        values: ``[B, Hkv, slots, Dv]``; the last dimension is contiguous.
        positions: int64 ``[B, slots]``; read if ``PLACED``.
        unused: uint8 ``[B, slots]``, 1 where there is no token; read if ``UNUSED``.
        kept_scores: fp32 ``[rows, rows_m, slots]``, written if ``KEEP_SCORES``.
        key_b, key_h, key_n: elements between sequences, heads and slots of the keys; for the values likewise.
        position_b, unused_b: elements between sequences of the positions and of ``unused``.
        slots: number of slots.
        per_split: slots of a split, a multiple of ``BLOCK_N``.
        first_split: index of the first split in ``partial``, after the splits of the pages.
        KEY_PAD: ``KEY_DIM`` rounded up to a power of two.
        VALUE_PAD: ``VALUE_DIM`` rounded up to a power of two.
        COMPUTE: type in which dot products take keys and values.
        OWN_LAST: whether the last slots hold the tokens of the queries, so that a query reads none behind its own.
    """
    row, batch, head, m = locate(rows_m, heads, BLOCK_M)
    split = tl.program_id(1)
    key_channel = tl.arange(0, KEY_PAD)
    key_there = key_channel < KEY_DIM
    value_channel = tl.arange(0, VALUE_PAD)
    value_there = value_channel < VALUE_DIM
    q = load_query(query, query_b, query_h, query_q, batch, head, m, rows_m, key_channel, key_there, GROUP)
    q = q.to(COMPUTE)
    ones = tl.full([BLOCK_M], 1.0, tl.float32)
    none = tl.zeros([BLOCK_M], tl.float32)
    key_base = keys + batch.to(tl.int64) * key_b + head.to(tl.int64) * key_h
    value_base = values + batch.to(tl.int64) * value_b + head.to(tl.int64) * value_h
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
        scores = finish_scores(scores, ones, none, inner, softcap, SOFTCAP)
        seen = keep[None, :]
        if PLACED:
            at = slot_positions(positions, position_b, batch, slot, keep, start)
            seen = sees(at, m, window, keep, GROUP, CAUSAL, WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        if KEEP_SCORES:
            to = (row.to(tl.int64) * rows_m + m)[:, None] * slots + slot[None, :]
            tl.store(kept_scores + to, scores * LN_2, mask=(m < rows_m)[:, None] & (slot < slots)[None, :])
        weights, decay, peak, total = weigh(scores, scores, peak, total)
        v = tl.load(
            value_base + slot64[:, None] * value_n + value_channel[None, :],
            # An unused slot may hold anything, infinity included, and 0 times infinity is not 0.
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
    # Partial results.
    partial,
    partial_lse,
    # Rotation and sinks.
    rotation,
    sinks,
    # Outputs.
    output,
    log_sum_exp,
    # Sizes.
    rows,
    rows_m,
    heads,
    page_splits,
    splits,
    # Constant sizes.
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    # Switches.
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
            # [CHUNK, DIM_PAD]: rows of the rotation, whose transpose is its inverse.
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
