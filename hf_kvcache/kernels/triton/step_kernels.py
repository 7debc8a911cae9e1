"""A decode step in two launches: attention of one new token a sequence over everything, then the merge of its parts.

``step_kernel`` has one grid over the splits of the pages and, behind them, those of the full-precision tokens. It
rotates the query in registers, and the program of the last split stores the new token. Its keys and values enter the
softmax from registers: no program reads the slot that another one writes. ``merge_kernel`` merges the splits of one
query head and rotates the part of the pages back.

:mod:`~hf_kvcache.kernels.triton.attention_parts` says what a split and a row are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_kvcache.kernels.triton.attention_kernels import _add_values, _page_scores
from hf_kvcache.kernels.triton.attention_parts import (
    LOG2_E,
    SMALLEST_SCALE,
    empty_softmax,
    entry_of,
    finish_scores,
    load_query,
    locate,
    locate_tokens,
    normalize,
    page_positions,
    record_at,
    rough_log2,
    store_partial,
    weigh,
)
from hf_kvcache.kernels.triton.sides import channels, load_per_token, load_table


@triton.jit
def _butterfly(x, signs, channel, ROWS: tl.constexpr, D: tl.constexpr, LOG_D: tl.constexpr, BACK: tl.constexpr):
    """fp32 ``[ROWS, D]`` times the orthonormal Walsh-Hadamard matrix, with signs before it, or behind if ``BACK``."""
    sign = tl.load(signs + channel)[None, :]
    if not BACK:
        x *= sign
    # A stage combines neighbors and puts sums before differences, as in `hadamard`: the channels end in their order.
    for _ in tl.static_range(LOG_D):
        left, right = tl.split(tl.reshape(x, [ROWS, D // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(left + right, left - right), (0, 2, 1)), [ROWS, D])
    x *= 1.0 / tl.sqrt(D + 0.0)
    if BACK:
        x *= sign
    return x


@triton.jit
def _rotated_query(
    query,
    query_b,
    query_h,
    rotation,
    batch,
    head,
    m,
    rows_m,
    channel,
    there,
    scale,
    side: tl.constexpr,
    GROUP: tl.constexpr,
    ROTATION: tl.constexpr,
    LOG_D: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Queries fp32 ``[BLOCK_M, D]`` in the basis of the pages, in padded order; first times ``scale`` if ``SCALED``."""
    DIM_PAD: tl.constexpr = side.segments * side.segment_pad
    if ROTATION != "matrix":
        q = load_query(query, query_b, query_h, 0, batch, head, m, rows_m, channel, there, GROUP)
        if SCALED:
            q *= tl.load(scale + channel, mask=there, other=1.0)[None, :]
        if ROTATION == "butterfly":
            q = _butterfly(q, rotation, channel, m.shape[0], DIM_PAD, LOG_D, False)
    else:
        q = tl.full([m.shape[0], DIM_PAD], 0.0, tl.float32)
        for first in tl.static_range(0, DIM_PAD, 16):
            part = first + tl.arange(0, 16)
            x = load_query(query, query_b, query_h, 0, batch, head, m, rows_m, part, part < side.dim, GROUP)
            if SCALED:
                x *= tl.load(scale + part, mask=part < side.dim, other=1.0)[None, :]
            inside = (part < side.dim)[:, None] & there[None, :]
            matrix = tl.load(rotation + part[:, None] * side.dim + channel[None, :], mask=inside, other=0.0)
            q = tl.dot(x, matrix, q, input_precision=side.precision)
    return q


@triton.jit
def _attend_pages(
    query,
    query_b,
    query_h,
    pages,
    positions,
    key_mean,
    key_scale,
    tables,
    rotation,
    partial,
    partial_lse,
    row,
    batch,
    head,
    m,
    rows,
    rows_m,
    capacity,
    first_page,
    last_page,
    split,
    oldest,
    mask,
    mask_least,
    records,
    record_bytes,
    kept,
    kept_row,
    inner,
    softcap,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    FULL: tl.constexpr,
    PLACED: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    CENTERED: tl.constexpr,
    SCALED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROTATION: tl.constexpr,
    LOG_D: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Attention over the pages ``[first_page, last_page)`` of a row, as in ``pages_kernel``.

    ``kept`` points to where the scores of the first page are written for the first row, if ``KEEP``.
    With ``PLACED == 3``, ``pages`` and ``positions`` are those of a static state, and ``mask`` is that of the sequence.
    """
    TILES: tl.constexpr = KEYS.page_pad // BLOCK_N
    MASKED: tl.constexpr = not FULL or KEYS.page != KEYS.page_pad
    TOKEN_SCALES: tl.constexpr = VALUES.folded and (not VALUES.channel or VALUES.other)
    key_channel, key_there = channels(KEYS)
    value_channel, value_there = channels(VALUES)
    key_table, value_table = load_table(tables, KEYS), load_table(tables + 16, VALUES)
    q = _rotated_query(
        query,
        query_b,
        query_h,
        rotation,
        batch,
        head,
        m,
        rows_m,
        key_channel,
        key_there,
        key_scale + row * KEYS.dim,
        KEYS,
        GROUP,
        ROTATION,
        LOG_D,
        SCALED,
    )
    q, q_peak = normalize(q, KEYS)
    shift = tl.zeros([m.shape[0]], tl.float32)
    if CENTERED:
        mean = tl.load(key_mean + row * KEYS.dim + key_channel, mask=key_there, other=0.0)
        shift = tl.sum(q.to(tl.float32) * mean[None, :], 1) * (1.0 / KEYS.product_unit)
    q_peak *= KEYS.product_unit
    peak, total = empty_softmax(m.shape[0])
    if m.shape[0] < 16:
        total = tl.zeros([m.shape[0], BLOCK_N], tl.float32)
    offset = tl.zeros([m.shape[0]], tl.float32)
    acc = tl.full([m.shape[0], VALUES.segments * VALUES.segment_pad], 0.0, tl.float32)
    end = last_page * TILES
    entries = pages + row.to(tl.int64) * capacity
    entry = entry_of(entries, first_page * TILES, end, TILES)
    for tile in tl.range(first_page * TILES, end, num_stages=STAGES):
        if PLACED == 3:
            record = tl.multiple_of(records + entry * record_bytes, 16)
            first = tile % TILES * BLOCK_N
            token = first + tl.arange(0, BLOCK_N)
            held, keep = KEYS.page - first, token < KEYS.page
        else:
            record = record_at(entry)
            place, first, token, held, keep = locate_tokens(pages, row, rows, capacity, tile, KEYS, BLOCK_N, FULL)
        entry = entry_of(entries, tile + 1, end, TILES)
        scores = _page_scores(record, q, first, held, key_table, key_channel, key_there, KEYS, BLOCK_N, MASKED)
        scores = finish_scores(scores, q_peak, shift, inner, softcap, SOFTCAP)
        if KEYS.bias_at:
            scores += (load_per_token(record, KEYS.bias_at, first, held, BLOCK_N, MASKED) * LOG2_E)[None, :]
        if PLACED == 3:
            if WINDOW or MASK > 0:
                at = tl.load(
                    positions + (batch.to(tl.int64) * capacity + tile // TILES) * KEYS.page + token, mask=keep, other=0
                )
                if WINDOW:
                    keep = keep & (at >= oldest)
                if MASK > 0:
                    keep, bias = shown(mask, at, keep, mask_least, MASK)
                    scores += bias[None, :]
        elif PLACED > 0:
            at = page_positions(pages, positions, place, rows, capacity, token, keep, KEYS, PLACED)
            keep = keep & (at >= oldest)
        if WINDOW or MASK > 0 or MASKED:
            scores = tl.where(keep[None, :], scores, float("-inf"))
        if KEEP:
            key = (tile // TILES) * KEYS.page + token
            to = (row.to(tl.int64) * rows_m + m)[:, None] * kept_row + key[None, :]
            tl.store(kept + to, scores, mask=(m < rows_m)[:, None] & (token < KEYS.page)[None, :])
        # As in `pages_kernel`: weights times a scale per token must stay in the range of half precision.
        height = scores
        token_scale = tl.zeros([BLOCK_N], tl.float32)
        if TOKEN_SCALES:
            if VALUES.channel:
                token_scale = load_per_token(record, VALUES.other_at, first, held, BLOCK_N, MASKED)
            else:
                token_scale = load_per_token(record, VALUES.scale_at, first, held, BLOCK_N, MASKED)
            height = scores + rough_log2(tl.maximum(tl.abs(token_scale), SMALLEST_SCALE))[None, :]
        hidden: tl.constexpr = WINDOW or MASK > 0 or MASKED or KEYS.bias_at > 0
        weights, decay, peak, total = weigh(scores, height, peak, total, hidden)
        if VALUES.folded and VALUES.zero and not VALUES.channel and not VALUES.other:
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
    if m.shape[0] < 16:
        total = tl.sum(total, 1)
    store_partial(
        partial, partial_lse, acc, peak, total, row, rows, m, rows_m, split, value_channel, value_there, VALUES.dim
    )


@triton.jit
def _attend_slots(
    query,
    query_b,
    query_h,
    new_keys,
    new_values,
    keys,
    values,
    positions,
    key_n,
    value_n,
    partial,
    partial_lse,
    row,
    batch,
    head,
    m,
    rows,
    rows_m,
    first_slot,
    last_slot,
    slot,
    split,
    position,
    oldest,
    mask,
    mask_least,
    max_length,
    kept,
    kept_row,
    inner,
    softcap,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOW: tl.constexpr,
    STATIC: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Attention over the slots ``[first_slot, last_slot)`` of a row, and over the new token in the last split.

    ``keys`` and ``values`` point to the first slot of the row, ``positions`` to that of the sequence, and ``mask`` to
    its mask. ``kept`` points to where the scores of the first slot are written for the first row, if ``KEEP``. In a
    static state, a token that its mask hides or for which there is no room is not stored.
    """
    key_channel, value_channel = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    key_there, value_there = key_channel < KEY_DIM, value_channel < VALUE_DIM
    q = load_query(query, query_b, query_h, 0, batch, head, m, rows_m, key_channel, key_there, GROUP)
    narrow = q.to(COMPUTE)
    ones = tl.full([m.shape[0]], 1.0, tl.float32)
    none = tl.zeros([m.shape[0]], tl.float32)
    peak, total = empty_softmax(m.shape[0])
    acc = tl.zeros([m.shape[0], VALUE_PAD], tl.float32)
    for first in tl.range(first_slot, last_slot, BLOCK_N, num_stages=STAGES):
        at = first + tl.arange(0, BLOCK_N)
        keep = at < last_slot
        bias = tl.zeros([BLOCK_N], tl.float32)
        if WINDOW or MASK > 0:
            placed = tl.load(positions + at, mask=keep, other=0)
            if WINDOW:
                keep = keep & (placed >= oldest)
            if MASK > 0:
                keep, bias = shown(mask, placed, keep, mask_least, MASK)
        # A slot that counts for nothing may hold anything, infinity included, and 0 times infinity is not 0.
        k = tl.load(
            keys + at.to(tl.int64)[:, None] * key_n + key_channel[None, :],
            mask=keep[:, None] & key_there[None, :],
            other=0.0,
        )
        scores = tl.dot(narrow, tl.trans(k.to(COMPUTE)), input_precision=PRECISION)
        scores = finish_scores(scores, ones, none, inner, softcap, SOFTCAP)
        if MASK > 0:
            scores += bias[None, :]
        scores = tl.where(keep[None, :], scores, float("-inf"))
        if KEEP:
            to = (row.to(tl.int64) * rows_m + m)[:, None] * kept_row + at[None, :]
            tl.store(kept + to, scores, mask=(m < rows_m)[:, None] & (at < last_slot)[None, :])
        weights, decay, peak, total = weigh(scores, scores, peak, total)
        v = tl.load(
            values + at.to(tl.int64)[:, None] * value_n + value_channel[None, :],
            mask=keep[:, None] & value_there[None, :],
            other=0.0,
        )
        acc = tl.dot(weights.to(COMPUTE), v.to(COMPUTE), acc * decay[:, None], input_precision=PRECISION)
    if split == tl.num_programs(1) - 1:
        key_real, value_real = key_there, value_there
        if STATIC:
            own = tl.zeros([1], tl.int64) + position
            real, own_bias = own < max_length, tl.zeros([1], tl.float32)
            if MASK > 0:
                real, own_bias = shown(mask, own, real, mask_least, MASK)
            key_real, value_real = key_there & real, value_there & real
        k = tl.load(new_keys + key_channel, mask=key_real, other=0.0)
        v = tl.load(new_values + value_channel, mask=value_real, other=0.0)
        scores = tl.sum(q * k.to(tl.float32)[None, :], 1)
        scores = tl.sum(finish_scores(scores[:, None], ones, none, inner, softcap, SOFTCAP), 1)
        if STATIC:
            scores = tl.where(real, scores + own_bias, float("-inf"))
            higher = tl.maximum(peak, scores)
            higher = tl.where(higher == float("-inf"), 0.0, higher)
        else:
            higher = tl.maximum(peak, scores)
        if KEEP:
            tl.store(kept + (row.to(tl.int64) * rows_m + m) * kept_row + slot, scores, mask=m < rows_m)
        decay, weight = tl.exp2(peak - higher), tl.exp2(scores - higher)
        acc = acc * decay[:, None] + weight[:, None] * v.to(tl.float32)[None, :]
        peak, total = higher, total * decay + weight
        # Programs of one row with other queries write the same; none reads it in this launch.
        at = tl.cast(slot, tl.int64)
        tl.store(keys + at * key_n + key_channel, k, mask=key_real)
        tl.store(values + at * value_n + value_channel, v, mask=value_real)
        if STATIC:
            # All heads write the same.
            tl.store(positions + at + tl.arange(0, 1), own, mask=real)
        elif WINDOW:
            tl.store(positions + at, tl.cast(position, tl.int64))
    store_partial(
        partial, partial_lse, acc, peak, total, row, rows, m, rows_m, split, value_channel, value_there, VALUE_DIM
    )


@triton.jit
def shown(mask, at, keep, least, MASK: tl.constexpr):
    """Which of the tokens ``keep [n]`` at the positions ``at [n]`` a mask shows, and what it adds to scores in base 2.

    Args:
        mask: uint8, not 0 where a token is shown, if ``MASK == 1``; else numbers that are added to scores.
        least: a token is hidden where what is added is not above this.
    """
    found = tl.load(mask + at, mask=keep, other=0)
    if MASK == 1:
        keep, bias = keep & (found != 0), tl.zeros(at.shape, tl.float32)
    else:
        bias = found.to(tl.float32)
        keep = keep & (bias > least)
        bias *= LOG2_E
    return keep, bias


@triton.jit
def _attend_nothing(partial_lse, row, rows, m, rows_m, split):
    """Say that a split holds no token."""
    at = (split.to(tl.int64) * rows + row) * rows_m + m
    tl.store(partial_lse + at, tl.full([m.shape[0]], float("-inf"), tl.float32), mask=m < rows_m)


@triton.jit(
    do_not_specialize=[
        "slot",
        "position",
        "columns",
        "capacity",
        "page_splits",
        "per_dense",
        "rows",
        "heads",
        "rows_m",
        "window",
        "mask_b",
        "record_bytes",
        "kept_row",
        "kept_pages",
        "max_length",
    ]
)
def step_kernel(
    # The new token and the outputs; these change from launch to launch.
    query,
    new_keys,
    new_values,
    mask,
    partial,
    partial_lse,
    slot,
    position,
    # The full-precision tokens.
    keys,
    values,
    positions,
    # The pages.
    pages,
    page_places,
    key_mean,
    key_scale,
    tables,
    rotation,
    records,
    # Lengths on the device.
    state,
    # Scores.
    kept,
    # Strides.
    query_b,
    query_h,
    new_key_b,
    new_key_h,
    new_value_b,
    new_value_h,
    key_b,
    key_h,
    key_n,
    value_b,
    value_h,
    value_n,
    position_b,
    mask_b,
    record_bytes,
    kept_row,
    kept_pages,
    # Sizes and scoring.
    columns,
    capacity,
    page_splits,
    per_dense,
    rows,
    heads,
    rows_m,
    window,
    max_length,
    mask_least,
    inner,
    softcap,
    # Constant sizes.
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DENSE_N: tl.constexpr,
    STAGES: tl.constexpr,
    DENSE_STAGES: tl.constexpr,
    LEAST_PAGES: tl.constexpr,
    LOG_D: tl.constexpr,
    # Switches.
    STATE: tl.constexpr,
    FULL: tl.constexpr,
    PLACED: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    CENTERED: tl.constexpr,
    SCALED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROTATION: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Attention of one token a sequence over a split of the pages or of the full-precision tokens, which it joins.

    The grid is (rows times query blocks, splits): ``page_splits`` of the pages, then at least one of the slots, with
    ``per_dense`` slots each. Pages are divided evenly, by the number that there is now. A split without tokens writes a
    log-sum-exp of -inf and nothing else.

    Args:
        query: ``[B, Hq, 1, Dk]`` in the model's basis; the last dimension is contiguous.
        new_keys: ``[B, Hkv, 1, Dk]``, of the token; the last dimension is contiguous.
        new_values: ``[B, Hkv, 1, Dv]``, likewise.
        mask: what the query sees of each position, ``[B, L]``, see :func:`shown`; read if ``MASK``.
        partial: fp32 ``[splits, rows, rows_m, Dv]``, written; the splits of the pages in the rotated basis.
        partial_lse: fp32 ``[splits, rows, rows_m]``, written, in base 2.
        slot: slots in use before the token, where it is stored; unless ``STATE``.
        position: the token's position; unless ``STATE``.
        keys: ``[B, Hkv, slots, Dk]``; the new token's slot is written.
        values: ``[B, Hkv, slots, Dv]``, likewise.
        positions: int64 ``[B, slots]``; read if ``WINDOW`` or ``MASK``, written if ``WINDOW`` or ``STATE == 2``.
        pages: int64 ``[3, rows, capacity]``: addresses of the records, token counts, first positions. With
            ``PLACED == 3`` int64 ``[rows, capacity]``, numbers of the records.
        page_places: int32 ``[rows, capacity, P]``, positions; read if ``PLACED == 2``. With ``PLACED == 3``
            ``[B, capacity, P]``, read if ``WINDOW`` or ``MASK``.
        key_mean: fp32 ``[rows, Dk]`` in the rotated basis; read if ``CENTERED``.
        key_scale: fp32 ``[rows, Dk]``, what the keys were divided by before the rotation; read if ``SCALED``.
        tables: fp32 ``[2, 16]``, the levels of keys and values; read where a side has ``level="table"``.
        rotation: of the keys, fp32: signs ``[Dk]`` for ``"butterfly"``, ``[Dk, Dk]`` for ``"matrix"``.
        records: uint8, all records; read if ``PLACED == 3``.
        state: int64; with ``STATE == 1`` ``[2 + B]``: position of the token, columns of the table, slot of each
            sequence. With ``STATE == 2`` that of :class:`~hf_kvcache.kernels.static_state.StaticState`.
        kept: fp32 ``[rows, rows_m, kept_row]``, the scores in base 2, those of the slots first; written if ``KEEP``.
        query_b, query_h: elements between sequences and heads of the query; others likewise, ``_n`` between slots.
        record_bytes: bytes of a record.
        kept_row: elements between queries of ``kept``.
        kept_pages: where in a row of ``kept`` the scores of the pages begin.
        columns: pages of a row; unless ``STATE``.
        capacity: the distance between rows of the table.
        page_splits: splits of the pages.
        per_dense: slots of the other splits, a multiple of ``DENSE_N``.
        rows: sequences times KV heads.
        heads: KV heads.
        rows_m: query heads per KV head.
        window: tokens the query sees, itself included; used if ``WINDOW``.
        max_length: tokens that a sequence can have; used if ``STATE == 2``.
        mask_least: see :func:`shown`.
        inner: factor of the dot products.
        softcap: soft cap of the scores; used if ``SOFTCAP``.
        KEYS: the key side of a page; None if there are no pages.
        VALUES: the value side.
        KEY_PAD: ``KEY_DIM`` rounded up to a power of two.
        VALUE_PAD: ``VALUE_DIM`` rounded up to a power of two.
        COMPUTE: type in which dot products take full-precision tokens.
        PRECISION: how dot products of fp32 are done.
        GROUP: query heads per KV head.
        BLOCK_M: query heads of a program.
        BLOCK_N: tokens of a page that are computed at a time.
        DENSE_N: slots that are computed at a time.
        STAGES: depth of the software pipeline over pages.
        DENSE_STAGES: that over slots.
        LEAST_PAGES: pages of a split, at least.
        LOG_D: the logarithm of ``Dk``, for ``"butterfly"``.
        STATE: from which form of ``state`` lengths are read; 0 if from none. The grid may be larger than they need.
        FULL: whether every place of every page holds a token.
        PLACED: whether pages need positions: 0 if not, 1 if they hold tokens side by side, 2 if ``page_places`` says.
            3 for the pages of a static state.
        WINDOW: whether there is a sliding window.
        MASK: 0 if there is no mask, 1 for a boolean one, 2 for an additive one; with ``STATE == 2`` only.
        CENTERED: whether a key mean was subtracted from the keys.
        SCALED: whether the keys were divided by a scale.
        SOFTCAP: whether scores are capped.
        ROTATION: how the query is rotated: ``"none"``, ``"butterfly"``, ``"matrix"``.
        KEEP: whether to write the scores.
    """
    row, batch, head, m = locate(rows_m, heads, BLOCK_M)
    split = tl.program_id(1)
    batch64, head64 = batch.to(tl.int64), head.to(tl.int64)
    if STATE == 1:
        position = tl.load(state)
        columns = tl.load(state + 1).to(tl.int32)
        slot = tl.load(state + 2 + batch).to(tl.int32)
    if STATE == 2:
        position = tl.load(state)
        slot = tl.load(state + 2 + batch).to(tl.int32)
        columns = tl.load(state + 2 + rows // heads + batch).to(tl.int32)
    oldest = position - window + 1
    if split >= page_splits:
        first_slot = (split - page_splits) * per_dense
        last_slot = tl.minimum(first_slot + per_dense, slot)
        if (first_slot < last_slot) | (split == tl.num_programs(1) - 1):
            _attend_slots(
                query,
                query_b,
                query_h,
                new_keys + batch64 * new_key_b + head64 * new_key_h,
                new_values + batch64 * new_value_b + head64 * new_value_h,
                keys + batch64 * key_b + head64 * key_h,
                values + batch64 * value_b + head64 * value_h,
                positions + batch64 * position_b,
                key_n,
                value_n,
                partial,
                partial_lse,
                row,
                batch,
                head,
                m,
                rows,
                rows_m,
                first_slot,
                last_slot,
                slot,
                split,
                position,
                oldest,
                mask + batch64 * mask_b,
                mask_least,
                max_length,
                kept,
                kept_row,
                inner,
                softcap,
                KEY_DIM,
                VALUE_DIM,
                KEY_PAD,
                VALUE_PAD,
                COMPUTE,
                PRECISION,
                GROUP,
                DENSE_N,
                DENSE_STAGES,
                WINDOW,
                STATE == 2,
                MASK,
                SOFTCAP,
                KEEP,
            )
        else:
            _attend_nothing(partial_lse, row, rows, m, rows_m, split)
    elif KEYS is not None:
        per_split = tl.maximum(tl.cdiv(columns, page_splits), LEAST_PAGES)
        first_page = split * per_split
        last_page = tl.minimum(first_page + per_split, columns)
        if first_page < last_page:
            _attend_pages(
                query,
                query_b,
                query_h,
                pages,
                page_places,
                key_mean,
                key_scale,
                tables,
                rotation,
                partial,
                partial_lse,
                row,
                batch,
                head,
                m,
                rows,
                rows_m,
                capacity,
                first_page,
                last_page,
                split,
                oldest,
                mask + batch64 * mask_b,
                mask_least,
                records,
                record_bytes,
                kept + kept_pages,
                kept_row,
                inner,
                softcap,
                KEYS,
                VALUES,
                GROUP,
                BLOCK_N,
                STAGES,
                FULL,
                PLACED,
                WINDOW,
                MASK,
                CENTERED,
                SCALED,
                SOFTCAP,
                ROTATION,
                LOG_D,
                KEEP,
            )
        else:
            _attend_nothing(partial_lse, row, rows, m, rows_m, split)


@triton.jit
def _shares(partial_lse, at, split, splits, peak, total):
    """The shares of some splits in the whole."""
    lse = tl.load(partial_lse + at, mask=split < splits, other=float("-inf"))
    return tl.exp2(lse - peak) / total, lse > float("-inf")


@triton.jit
def merge_splits(
    output,
    partial,
    partial_lse,
    rotation,
    sinks,
    stride,
    page_splits,
    splits,
    query_heads,
    room,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    LOG_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ROTATION: tl.constexpr,
    SINKS: tl.constexpr,
    STATIC: tl.constexpr,
):
    """Merge the splits of the query head of this program, as :func:`merge_kernel` says.

    With ``STATIC`` there may be no token at all, which gives 0; and without ``room`` for the token the output is NaN.

    Returns:
        The log-sum-exp of all scores, in base 2, with the sink logit.
    """
    index = tl.program_id(0)
    channel = tl.arange(0, DIM_PAD)
    there = channel < DIM
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    sink = peak
    if SINKS:
        sink = tl.load(sinks + index % query_heads).to(tl.float32) * LOG2_E
        peak = sink
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        at = split.to(tl.int64) * stride + index
        peak = tl.maximum(peak, tl.max(tl.load(partial_lse + at, mask=split < splits, other=float("-inf")), 0))
    if STATIC:
        peak = tl.where(peak == float("-inf"), 0.0, peak)
    if SINKS:
        total += tl.exp2(sink - peak)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        at = split.to(tl.int64) * stride + index
        total += tl.sum(tl.exp2(tl.load(partial_lse + at, mask=split < splits, other=float("-inf")) - peak), 0)
    if STATIC:
        total = tl.where(room, tl.where(total > 0, total, 1.0), float("nan"))
    packed = tl.zeros([DIM_PAD], tl.float32)
    dense = tl.zeros([DIM_PAD], tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        at = split.to(tl.int64) * stride + index
        share, some = _shares(partial_lse, at, split, splits, peak, total)
        part = tl.load(partial + at[:, None] * DIM + channel[None, :], mask=some[:, None] & there[None, :], other=0.0)
        in_pages = split < page_splits
        packed += tl.sum(part * tl.where(in_pages, share, 0.0)[:, None], 0)
        dense += tl.sum(part * tl.where(in_pages, 0.0, share)[:, None], 0)
    to = output + index.to(tl.int64) * DIM
    if ROTATION == "matrix":
        # Rows of the rotation, whose transpose is its inverse.
        for first in tl.static_range(0, DIM_PAD, 16):
            row = first + tl.arange(0, 16)
            inside = (row < DIM)[:, None] & there[None, :]
            matrix = tl.load(rotation + row[:, None] * DIM + channel[None, :], mask=inside, other=0.0)
            own = tl.where(row[:, None] == channel[None, :], 1.0, 0.0)
            result = tl.sum(matrix * packed[None, :] + own * dense[None, :], 1)
            tl.store(to + row, result.to(output.dtype.element_ty), mask=row < DIM)
    else:
        if ROTATION == "butterfly":
            packed = _butterfly(packed[None, :], rotation, channel, 1, DIM_PAD, LOG_D, True)
            packed = tl.reshape(packed, [DIM_PAD])
        tl.store(to + channel, (packed + dense).to(output.dtype.element_ty), mask=there)
    return peak + tl.log2(total)


@triton.jit(do_not_specialize=["stride", "page_splits", "splits", "batch"])
def merge_kernel(
    # Output and partial results; they change from launch to launch.
    output,
    partial,
    partial_lse,
    # The log-sum-exp.
    log_sum_exp,
    # Rotation and sinks.
    rotation,
    sinks,
    # Lengths on the device.
    state,
    # Sizes.
    stride,
    page_splits,
    splits,
    batch,
    query_heads,
    # Constant sizes.
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    LOG_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STATE_PAD: tl.constexpr,
    # Switches.
    ROTATION: tl.constexpr,
    SINKS: tl.constexpr,
    ADVANCE: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Merge the splits of one query head of one sequence; grid (sequences times query heads).

    Args:
        output: ``[B, 1, Hq, DIM]``, written.
        partial: fp32 ``[splits, B * Hq, DIM]``, the first ``page_splits`` in the basis of the pages.
        partial_lse: fp32 ``[splits, B * Hq]``, in base 2; where it is -inf, ``partial`` holds anything.
        log_sum_exp: fp32 ``[B * Hq]``, in base 2; written if ``KEEP``.
        rotation: of the values, as in :func:`step_kernel`.
        sinks: a logit per query head, ``[Hq]``; read if ``SINKS``.
        state: as in :func:`step_kernel`; if ``ADVANCE``, position and slots are counted on.
        stride: sequences times query heads.
        page_splits: splits of the pages.
        splits: all splits.
        batch: sequences.
        query_heads: query heads.
        DIM_PAD: ``DIM`` rounded up to a power of two.
        LOG_D: the logarithm of ``DIM``, for ``"butterfly"``.
        BLOCK_S: splits that are read at a time.
        STATE_PAD: ``batch + 2`` rounded up to a power of two.
        ROTATION: how the part of the pages is rotated back: ``"none"``, ``"butterfly"``, ``"matrix"``.
        SINKS: whether there are sink logits.
        ADVANCE: whether to count the token in ``state``.
        KEEP: whether to write the log-sum-exp.
    """
    found = merge_splits(
        output, partial, partial_lse, rotation, sinks, stride, page_splits, splits, query_heads, True, DIM, DIM_PAD,
        LOG_D, BLOCK_S, ROTATION, SINKS, False,
    )  # fmt: skip
    if KEEP:
        tl.store(log_sum_exp + tl.program_id(0), found)
    if ADVANCE:
        index = tl.program_id(0)
        number = tl.arange(0, STATE_PAD)
        # A vector, since the interpreter makes no mask of a scalar and a vector.
        own = (number < batch + 2) & (index + tl.zeros_like(number) == 0)
        old = tl.load(state + number, mask=own, other=0)
        tl.store(state + number, old + tl.where(number == 1, 0, 1), mask=own)
