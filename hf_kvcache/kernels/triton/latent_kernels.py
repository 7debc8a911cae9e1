"""Absorbed multi-head latent attention in Triton: over pages, over full-precision tokens, and the merge of both.

A program reads a block of latents once and uses it twice, as keys and as values, for up to 64 queries (query heads
times query tokens). So the bytes of the cache are nearly all that is read from memory, as in FlashMLA. All heads read
the same latents: there is one KV head, and a row is a sequence. :mod:`~hf_kvcache.kernels.triton.attention_parts`
describes how the work is divided. The partial outputs of pages are in the rotated basis.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_kvcache.kernels.triton.attention_parts import (
    LN_2,
    LOG2_E,
    SMALLEST_SCALE,
    empty_softmax,
    finish_scores,
    load_query,
    locate,
    locate_slots,
    locate_tokens,
    normalize,
    page_positions,
    record_at,
    sees,
    slot_positions,
    store_partial,
    weigh,
)
from hf_kvcache.kernels.triton.elements import load_elements
from hf_kvcache.kernels.triton.extend_kernels import load_partial
from hf_kvcache.kernels.triton.sides import (
    channels,
    levels_of,
    load_codes,
    load_per_token,
    load_table,
    load_tile,
)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _decoded_once(x):
    """``x`` of 16 bits, unchanged. The compiler takes the result for a sum, and does not move the decoding behind it.

    Otherwise it would let every warp decode its own part of the codes for each dot product, three times the work.
    """
    bits = x.to(tl.uint16, bitcast=True)
    return tl.reduce(tl.join(bits, tl.zeros_like(bits)), 2, _either).to(x.dtype, bitcast=True)


@triton.jit
def _load_latents(
    record, first, held, table, channel, there, side: tl.constexpr, n: tl.constexpr, masked: tl.constexpr
):
    """Latents ``[n, R]`` of a page in the type of computation, without the scales of tokens if they are folded."""
    x = _decode_latents(record, first, held, table, channel, there, side, n, masked)
    if side.level != "dense" and side.compute == tl.float16:
        x = _decoded_once(x)
    return x


@triton.jit
def _decode_latents(
    record, first, held, table, channel, there, side: tl.constexpr, n: tl.constexpr, masked: tl.constexpr
):
    if side.folded:
        return levels_of(load_codes(record, first, held, side, n, masked), table, side, side.compute)
    elif side.level == "dense" or side.channel or side.other:
        return load_elements(record, first, held, table, channel, there, side, n, masked)
    else:
        levels = levels_of(load_codes(record, first, held, side, n, masked), table, side, side.compute)
        x = tl.reshape(levels, [n, side.dim // side.group, side.group])
        x = x * _load_groups(record, side.scale_at, first, held, side, n, masked)
        if side.zero:
            x = x + _load_groups(record, side.zero_at, first, held, side, n, masked)
        return tl.reshape(x, [n, side.dim])


@triton.jit
def _load_groups(record, at: tl.constexpr, first, held, side: tl.constexpr, n: tl.constexpr, masked: tl.constexpr):
    """A field of one number per token and group of channels, ``[n, groups, 1]`` in the type of computation."""
    groups: tl.constexpr = side.dim // side.group
    cells = (first + tl.arange(0, n))[:, None] * groups + tl.arange(0, groups)[None, :]
    there = tl.full([groups], True, tl.int1)
    numbers = load_tile((record + at).to(tl.pointer_type(tl.float16)), cells, held, there, masked)
    return numbers.to(side.compute)[:, :, None]


@triton.jit
def _apply_mask(
    scores, mask, stride_h, stride_q, m, rows_m, column, columns, keep, lowest, GROUP: tl.constexpr, MASK: tl.constexpr
):
    """Scores in base 2 of keys in the columns ``column [BLOCK_N]`` of the mask, -inf where the mask hides them."""
    rows = (m % GROUP).to(tl.int64) * stride_h + (m // GROUP).to(tl.int64) * stride_q
    inside = (m < rows_m)[:, None] & (keep & (column >= 0) & (column < columns))[None, :]
    said = tl.load(mask + rows[:, None] + column[None, :], mask=inside, other=0)
    if MASK == "bool":
        return tl.where(inside & (said != 0), scores, float("-inf"))
    else:
        added = said.to(tl.float32)
        return scores + tl.where(inside & (added > lowest), added, float("-inf")) * LOG2_E


@triton.jit(
    do_not_specialize=[
        "rows",
        "columns",
        "capacity",
        "start",
        "per_split",
        "rows_m",
        "window",
        "mask_shift",
        "mask_columns",
    ]
)
def pages_kernel(
    # Query.
    query,
    turned_query,
    # Pages.
    pages,
    positions,
    tables,
    # Mask.
    mask,
    # Outputs.
    partial,
    partial_lse,
    # Strides.
    query_b,
    query_h,
    query_q,
    turned_b,
    turned_h,
    turned_q,
    mask_b,
    mask_h,
    mask_q,
    # Sizes and scoring.
    rows,
    columns,
    capacity,
    start,
    per_split,
    rows_m,
    window,
    mask_shift,
    mask_columns,
    inner,
    softcap,
    lowest,
    # Constant sizes.
    LATENTS: tl.constexpr,
    ROTARY: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    # Switches.
    FULL: tl.constexpr,
    PLACED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Attention of ``BLOCK_M`` queries of a sequence over the pages of a split; grid (rows times query blocks, splits).

    Query ``m`` of a row is query token ``m // GROUP`` of head ``m % GROUP``.

    Args:
        query: ``[B, H, q, r]`` in the rotated basis of the latents; the last dimension is contiguous.
        turned_query: ``[B, H, q, dr]`` in the rotated basis of the rotary keys; the last dimension is contiguous. Not
            read without ``ROTARY``.
        pages: int64 ``[3, rows, capacity]``: addresses of the records, token counts, first positions.
        positions: int32 ``[rows, capacity, P]``; read if ``PLACED == 2``.
        tables: fp32 ``[2, 16]``, the levels of latents and rotary keys; read where a side has ``level="table"``.
        mask: ``[B, H or 1, q or 1, mask_columns]`` of bytes or floats; read if there is a ``MASK``. The last dimension
            is contiguous; the stride of a dimension of size 1 is 0.
        partial: fp32 ``[splits, rows, rows_m, r]``, written.
        partial_lse: fp32 ``[splits, rows, rows_m]``, written.
        query_b, query_h, query_q: elements between sequences, heads and tokens of the query; for the rotary part of the
            query (``turned_b`` ...) and the mask (``mask_b`` ...) likewise.
        rows: sequences.
        columns: pages of a row.
        capacity: the distance between rows of the table.
        start: position of the first query.
        per_split: pages of a split.
        rows_m: queries of a row.
        window: tokens a query sees, itself included; used if ``WINDOW``.
        mask_shift: the column of the mask for the position of the first query.
        inner: factor of the dot products.
        softcap: soft cap of the scores; used if ``SOFTCAP``.
        lowest: what an additive mask must exceed to let a query see.
        LATENTS: the side of a page that holds the latents.
        ROTARY: the side that holds the rotary keys; None if there are none.
        GROUP: query heads.
        BLOCK_M: queries of a program.
        BLOCK_N: tokens of a page that are computed at a time.
        STAGES: depth of the software pipeline.
        FULL: whether every place of every page holds a token.
        PLACED: 0 if all queries see all tokens, 1 if pages hold tokens side by side, 2 if ``positions`` says where.
        CAUSAL: whether a query sees no later token; used if ``PLACED``.
        WINDOW: whether there is a sliding window; used if ``PLACED``.
        MASK: ``"bool"``, ``"additive"`` or ``"none"``; used if ``PLACED``.
        SOFTCAP: whether scores are capped.
    """
    TILES: tl.constexpr = LATENTS.page_pad // BLOCK_N
    MASKED: tl.constexpr = not FULL or LATENTS.page != LATENTS.page_pad
    # Decoded latents go through shared memory. As the first factor, the fragments of 32 queries would be read before
    # the barrier and wait in registers, of which there are not enough. As the second factor they are read after it.
    SWAPPED: tl.constexpr = BLOCK_M == 32 and LATENTS.level != "dense"
    row, batch, head, m = locate(rows_m, 1, BLOCK_M)
    split = tl.program_id(1)
    channel, there = channels(LATENTS)
    table = load_table(tables, LATENTS)
    q = load_query(query, query_b, query_h, query_q, batch, head, m, rows_m, channel, there, GROUP)
    q, q_peak = normalize(q, LATENTS)
    q_sum = tl.sum(q.to(tl.float32), 1)
    if ROTARY is not None:
        turned_channel, turned_there = channels(ROTARY)
        turned_table = load_table(tables + 16, ROTARY)
        turned = load_query(
            turned_query, turned_b, turned_h, turned_q, batch, head, m, rows_m, turned_channel, turned_there, GROUP
        )
        turned, turned_peak = normalize(turned, ROTARY)
    ones = tl.full([BLOCK_M], 1.0, tl.float32)
    none = tl.zeros([BLOCK_M], tl.float32)
    mask += batch.to(tl.int64) * mask_b
    peak, total = empty_softmax(BLOCK_M)
    offset = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.full([BLOCK_M, LATENTS.dim], 0.0, tl.float32)
    last = tl.minimum((split + 1) * per_split, columns)
    for tile in tl.range(split * per_split * TILES, last * TILES, num_stages=STAGES):
        place, first, token, held, keep = locate_tokens(pages, row, rows, capacity, tile, LATENTS, BLOCK_N, FULL)
        record = record_at(tl.load(pages + place))
        latents = _load_latents(record, first, held, table, channel, there, LATENTS, BLOCK_N, MASKED)
        if SWAPPED:
            scores = tl.trans(tl.dot(latents, tl.trans(q), input_precision=LATENTS.precision))
        else:
            scores = tl.dot(q, tl.trans(latents), input_precision=LATENTS.precision)
        scale = tl.zeros([BLOCK_N], tl.float32)
        zero = tl.zeros([BLOCK_N], tl.float32)
        if LATENTS.folded:
            scale = load_per_token(record, LATENTS.scale_at, first, held, BLOCK_N, MASKED)
            scores *= scale[None, :]
            if LATENTS.zero:
                zero = load_per_token(record, LATENTS.zero_at, first, held, BLOCK_N, MASKED)
                if LATENTS.middle:
                    zero += scale * LATENTS.middle
                scores += q_sum[:, None] * zero[None, :]
        scores *= q_peak[:, None]
        if ROTARY is not None:
            keys = load_elements(
                record, first, held, turned_table, turned_channel, turned_there, ROTARY, BLOCK_N, MASKED
            )
            scores += tl.dot(turned, tl.trans(keys), input_precision=ROTARY.precision) * turned_peak[:, None]
        scores = finish_scores(scores, ones, none, inner, softcap, SOFTCAP)
        if PLACED > 0:
            at = page_positions(pages, positions, place, rows, capacity, token, keep, LATENTS, PLACED) - start
            seen = sees(at, m, window, keep, GROUP, CAUSAL, WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
            if MASK != "none":
                scores = _apply_mask(
                    scores, mask, mask_h, mask_q, m, rows_m, at + mask_shift, mask_columns, keep, lowest, GROUP, MASK
                )
        elif MASKED:
            scores = tl.where(keep[None, :], scores, float("-inf"))
        height = scores
        if LATENTS.folded:
            # The product of weight and scale must stay in the range of half precision, as in ``attention_kernels``.
            height = scores + tl.log2(tl.maximum(tl.abs(scale), SMALLEST_SCALE))[None, :]
        weights, decay, peak, total = weigh(scores, height, peak, total)
        if LATENTS.zero and LATENTS.folded:
            offset = offset * decay + tl.sum(weights * zero[None, :], 1)
        if LATENTS.folded:
            weights *= scale[None, :]
        acc = tl.dot(weights.to(LATENTS.compute), latents, acc * decay[:, None], input_precision=LATENTS.precision)
    acc += offset[:, None]
    store_partial(partial, partial_lse, acc, peak, total, row, rows, m, rows_m, split, channel, there, LATENTS.dim)


@triton.jit(
    do_not_specialize=[
        "rows",
        "slots",
        "per_split",
        "rows_m",
        "window",
        "mask_shift",
        "mask_columns",
        "first_split",
        "skipped",
        "start",
    ]
)
def dense_kernel(
    # Query.
    query,
    turned_query,
    # Full-precision tokens.
    latents,
    rotary,
    positions,
    unused,
    # Mask.
    mask,
    # Outputs.
    partial,
    partial_lse,
    # Strides.
    query_b,
    query_h,
    query_q,
    turned_b,
    turned_h,
    turned_q,
    latent_b,
    latent_n,
    rotary_b,
    rotary_n,
    position_b,
    unused_b,
    mask_b,
    mask_h,
    mask_q,
    # Sizes and scoring.
    rows,
    slots,
    per_split,
    rows_m,
    window,
    mask_shift,
    mask_columns,
    first_split,
    skipped,
    start,
    inner,
    softcap,
    lowest,
    # Constant sizes.
    R: tl.constexpr,
    DR: tl.constexpr,
    DR_PAD: tl.constexpr,
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
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CONTINUED: tl.constexpr,
):
    """Attention of ``BLOCK_M`` queries of a sequence over a split of full-precision tokens.

    The tokens may also be decoded pages. All arguments that are not described here are those of :func:`pages_kernel`.

    Args:
        query: ``[B, H, q, r]`` in the basis of the latents; the last dimension is contiguous.
        turned_query: ``[B, H, q, dr]`` in the basis of the rotary keys; the last dimension is contiguous. Not read if
            ``DR`` is 0.
        latents: ``[B, slots, r]``; the last dimension is contiguous.
        rotary: ``[B, slots, dr]``; the last dimension is contiguous. Not read if ``DR`` is 0.
        positions: int64 ``[B, slots]``; read if ``PLACED``.
        unused: uint8 ``[B, slots]``, 1 where there is no token; read if ``UNUSED``.
        latent_b, latent_n: elements between sequences and slots of the latents; for the rotary keys likewise.
        position_b, unused_b: elements between sequences of the positions and of ``unused``.
        slots: number of slots.
        per_split: slots of a split, a multiple of ``BLOCK_N``.
        first_split: index of the first split in ``partial``, after the splits of the pages.
        skipped: splits of the grid before those of this kernel.
        DR_PAD: ``DR`` rounded up to a power of two that dot products take.
        COMPUTE: type in which dot products take latents and rotary keys.
        CONTINUED: whether to go on from what ``partial`` holds.
    """
    row, batch, head, m = locate(rows_m, 1, BLOCK_M)
    split = tl.program_id(1) - skipped
    to = split + first_split
    channel = tl.arange(0, R)
    turned_channel = tl.arange(0, DR_PAD)
    there = channel < R
    turned_there = turned_channel < DR
    q = load_query(query, query_b, query_h, query_q, batch, head, m, rows_m, channel, there, GROUP)
    q_peak = tl.full([BLOCK_M], 1.0, tl.float32)
    if tl.float16 == COMPUTE:
        # Absorbed queries may leave the range of half precision.
        q_peak = tl.max(tl.abs(q), 1)
    if DR > 0:
        turned = load_query(
            turned_query, turned_b, turned_h, turned_q, batch, head, m, rows_m, turned_channel, turned_there, GROUP
        )
        if tl.float16 == COMPUTE:
            q_peak = tl.maximum(q_peak, tl.max(tl.abs(turned), 1))
    if tl.float16 == COMPUTE:
        q_peak = tl.where(q_peak > 0, q_peak, 1.0)
        q = q / q_peak[:, None]
        if DR > 0:
            turned = turned / q_peak[:, None]
    q = q.to(COMPUTE)
    if DR > 0:
        turned = turned.to(COMPUTE)
    none = tl.zeros([BLOCK_M], tl.float32)
    latents += batch.to(tl.int64) * latent_b
    rotary += batch.to(tl.int64) * rotary_b
    mask += batch.to(tl.int64) * mask_b
    if CONTINUED:
        acc, peak, total = load_partial(partial, partial_lse, row, rows, m, rows_m, to, channel, there, R, BLOCK_M)
    else:
        peak, total = empty_softmax(BLOCK_M)
        acc = tl.zeros([BLOCK_M, R], tl.float32)
    last = tl.minimum((split + 1) * per_split, slots)
    for first in tl.range(split * per_split, last, BLOCK_N, num_stages=STAGES):
        slot, keep = locate_slots(unused, unused_b, batch, first, slots, BLOCK_N, UNUSED)
        slot64 = slot.to(tl.int64)
        # An unused slot may hold anything, infinity included, and 0 times infinity is not 0.
        tile = tl.load(latents + slot64[:, None] * latent_n + channel[None, :], mask=keep[:, None], other=0.0)
        tile = tile.to(COMPUTE)
        scores = tl.dot(q, tl.trans(tile), input_precision=PRECISION)
        if DR > 0:
            keys = tl.load(
                rotary + slot64[:, None] * rotary_n + turned_channel[None, :],
                mask=keep[:, None] & turned_there[None, :],
                other=0.0,
            )
            scores = tl.dot(turned, tl.trans(keys.to(COMPUTE)), scores, input_precision=PRECISION)
        scores = finish_scores(scores, q_peak, none, inner, softcap, SOFTCAP)
        seen = keep[None, :]
        if PLACED:
            at = slot_positions(positions, position_b, batch, slot, keep, start)
            seen = sees(at, m, window, keep, GROUP, CAUSAL, WINDOW)
            if MASK != "none":
                scores = _apply_mask(
                    scores, mask, mask_h, mask_q, m, rows_m, at + mask_shift, mask_columns, keep, lowest, GROUP, MASK
                )
        scores = tl.where(seen, scores, float("-inf"))
        weights, decay, peak, total = weigh(scores, scores, peak, total)
        acc = tl.dot(weights.to(COMPUTE), tile, acc * decay[:, None], input_precision=PRECISION)
    store_partial(partial, partial_lse, acc, peak, total, row, rows, m, rows_m, to, channel, there, R)


@triton.jit
def _sum_parts(partial, partial_lse, first, last, row, rows, m, rows_m, total, R: tl.constexpr, BLOCK_S: tl.constexpr):
    """fp32 ``[R]``: the sum of the outputs of splits ``first`` to ``last``, each times its share in ``total``."""
    channel = tl.arange(0, R)
    shift = tl.where(total == float("-inf"), 0.0, total)
    result = tl.zeros([R], tl.float32)
    for block in range(first, last, BLOCK_S):
        split = block + tl.arange(0, BLOCK_S)
        slot = (split.to(tl.int64) * rows + row) * rows_m + m
        share = tl.exp2(tl.load(partial_lse + slot, mask=split < last, other=float("-inf")) - shift)
        part = tl.load(partial + slot[:, None] * R + channel[None, :], mask=(split < last)[:, None], other=0.0)
        result += tl.sum(part * share[:, None], 0)
    return result


@triton.jit
def _rotate_back(x, signs, R: tl.constexpr, LOG_R: tl.constexpr, SIGNED: tl.constexpr):
    """fp32 ``[R]`` from the rotated basis to the model's, by the transform of ``hadamard.py`` for a single vector."""
    for _ in tl.static_range(LOG_R):
        left, right = tl.split(tl.reshape(x, [R // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(left + right, left - right), (1, 0)), [R])
    x *= 1.0 / tl.sqrt(R + 0.0)
    if SIGNED:
        x *= tl.load(signs + tl.arange(0, R))
    return x


@triton.jit(do_not_specialize=["rows", "rows_m", "page_splits", "splits"])
def merge_kernel(
    # Partial results.
    partial,
    partial_lse,
    # Rotation and sinks.
    signs,
    sinks,
    # Outputs.
    output,
    log_sum_exp,
    # Sizes.
    rows,
    rows_m,
    page_splits,
    splits,
    # Constant sizes.
    R: tl.constexpr,
    LOG_R: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    # Switches.
    ROTATED: tl.constexpr,
    SIGNED: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Merge the splits of one query, the first ``page_splits`` of them in the rotated basis; grid (queries, rows).

    Args:
        partial: fp32 ``[splits, rows, rows_m, R]``.
        partial_lse: fp32 ``[splits, rows, rows_m]``, in base 2.
        signs: fp32 ``[R]``, of the rotation; read if ``SIGNED``.
        sinks: a logit per query head, fp32 ``[H]``; read if ``SINKS``.
        output: ``[B, q, H, R]``, written.
        log_sum_exp: fp32 ``[B, H, q]``, written.
        LOG_R: the logarithm of ``R`` in base 2.
        BLOCK_S: splits that are read at a time.
        ROTATED: whether the partial outputs of pages are in a rotated basis.
    """
    m, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    peak = tl.full([], float("-inf"), tl.float32)
    if SINKS:
        peak = tl.load(sinks + m % GROUP) * LOG2_E
    sink = peak
    for block in range(0, splits, BLOCK_S):
        split = block + tl.arange(0, BLOCK_S)
        slot = (split.to(tl.int64) * rows + row) * rows_m + m
        peak = tl.maximum(peak, tl.max(tl.load(partial_lse + slot, mask=split < splits, other=float("-inf")), 0))
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.exp2(sink - shift)
    for block in range(0, splits, BLOCK_S):
        split = block + tl.arange(0, BLOCK_S)
        slot = (split.to(tl.int64) * rows + row) * rows_m + m
        total += tl.sum(tl.exp2(tl.load(partial_lse + slot, mask=split < splits, other=float("-inf")) - shift), 0)
    total = peak + tl.log2(tl.where(peak == float("-inf"), 1.0, total))
    result = _sum_parts(partial, partial_lse, 0, page_splits, row, rows, m, rows_m, total, R, BLOCK_S)
    if ROTATED:
        result = _rotate_back(result, signs, R, LOG_R, SIGNED)
    result += _sum_parts(partial, partial_lse, page_splits, splits, row, rows, m, rows_m, total, R, BLOCK_S)
    query, head, length = m // GROUP, m % GROUP, rows_m // GROUP
    at = (row * length + query) * GROUP + head
    tl.store(output + at * R + tl.arange(0, R), result.to(output.dtype.element_ty))
    tl.store(log_sum_exp + (row * GROUP + head) * length + query, total * LN_2)
