"""A compiled step of a layer with a fixed maximum length: what follows attention in ``step_kernel``.

Every launch has the same grid and the same arguments at every step: lengths, and whether a page is due, are read on the
device. So a CUDA graph can be captured once and replayed.

1. ``step_kernel`` attends, and stores the new token and its position in the first free slot of each sequence.
2. ``merge_static_kernel`` merges the splits. One program of each sequence counts the token, and writes what it sets off
   into ``events``: four numbers a sequence, whether a page is due, in which column of the table it goes (-1 if it has
   left the window), how many pages have left the window, and whether the page fixes the key mean.
3. ``due_mean_kernel`` finds that key mean, for codecs that subtract one.
4. ``_encode_kernel`` encodes the page.
5. ``commit_kernel`` moves the slots behind the page down, keeps the table, and counts the step.

The last three return at once where nothing is due. No program reads what another one of the same launch writes:
counters of sequences are read in 1 and changed in 2, each by a program of its own, and the number of tokens seen is
read in 1 and 2 and changed in 5.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_kvcache.kernels import static_state
from hf_kvcache.kernels.triton.key_mean import EVENTS as EVENT_NUMBERS
from hf_kvcache.kernels.triton.step_kernels import merge_splits, shown

_HEADER = tl.constexpr(static_state.HEADER)
_LENGTH, _PAGES = tl.constexpr(static_state.LENGTH), tl.constexpr(static_state.PAGES)
_MEAN_KNOWN, _GAPS = tl.constexpr(static_state.MEAN_KNOWN), tl.constexpr(static_state.GAPS)
_FIRST, _LAST = tl.constexpr(static_state.FIRST), tl.constexpr(static_state.LAST)
_EVENTS = tl.constexpr(EVENT_NUMBERS)


@triton.jit(
    do_not_specialize=[
        "stride",
        "page_splits",
        "splits",
        "batch",
        "heads",
        "slots",
        "sink_length",
        "page_size",
        "capacity",
        "window",
        "max_length",
        "mask_b",
    ]
)
def merge_static_kernel(
    # These change from launch to launch.
    output,
    partial,
    partial_lse,
    events,
    mask,
    # Rotation and sinks.
    rotation,
    sinks,
    # The state.
    state,
    positions,
    page_positions,
    first,
    # Sizes.
    stride,
    page_splits,
    splits,
    batch,
    query_heads,
    heads,
    slots,
    sink_length,
    page_size,
    capacity,
    window,
    max_length,
    mask_b,
    mask_least,
    # Constant sizes.
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    LOG_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    COLUMNS_PAD: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    # Switches.
    ROTATION: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
):
    """Merge the splits of one query head of one sequence, and count the token; grid (sequences times query heads).

    Args:
        output: ``[B, 1, Hq, DIM]``, written; NaN if there is no room for the token.
        partial: see :func:`~hf_kvcache.kernels.triton.step_kernels.merge_kernel`, like all that is not named here.
        events: int64 ``[B, 4]``, written.
        mask: see :func:`~hf_kvcache.kernels.triton.step_kernels.step_kernel`.
        state: see :class:`~hf_kvcache.kernels.static_state.StaticState`; the counters are changed.
        positions: int64 ``[B, slots]``, of the tokens in slots, that of the new one included.
        page_positions: int32 ``[B, capacity, page_size]``.
        first: int64 ``[B * heads, capacity]``, positions of the pages' first tokens; written where a page is due.
        heads: KV heads.
        slots: slots of a sequence; with the last one in use, a page is due.
        sink_length: slots before those of the page that is due next.
        capacity: pages that a row can hold.
        window: tokens that a query sees; used if ``WINDOW``.
        max_length: tokens that a sequence can have.
        mask_b: elements between the masks of sequences.
        mask_least: as in ``step_kernel``.
        COLUMNS_PAD: ``capacity`` rounded up to a power of two.
        HEADS_PAD: ``heads`` rounded up to a power of two.
    """
    position = tl.load(state)
    merge_splits(
        output, partial, partial_lse, rotation, sinks, stride, page_splits, splits, query_heads, position < max_length,
        DIM, DIM_PAD, LOG_D, BLOCK_S, ROTATION, SINKS, True,
    )  # fmt: skip
    index = tl.program_id(0)
    if index % query_heads == 0:
        sequence = (index // query_heads).to(tl.int64)
        counters = state + _HEADER + sequence
        valid = position < max_length
        if MASK > 0:
            one = tl.zeros([1], tl.int64) + position
            real, _ = shown(mask + sequence * mask_b, one, one < max_length, mask_least, MASK)
            valid = tl.sum(real.to(tl.int32), 0) > 0
        # Where the token stands among those seen.
        last = tl.load(counters + _LAST * batch)
        if valid:
            before = tl.where(last < 0, position - 1, last)
            gaps = tl.load(counters + _GAPS * batch)
            tl.store(counters + _GAPS * batch, gaps | (position - before != 1).to(tl.int64))
            oldest = tl.load(counters + _FIRST * batch)
            tl.store(counters + _FIRST * batch, tl.where(last < 0, position, oldest))
            tl.store(counters + _LAST * batch, position)
        length = tl.load(counters + _LENGTH * batch) + valid.to(tl.int64)
        pages, known = tl.load(counters + _PAGES * batch), tl.load(counters + _MEAN_KNOWN * batch)
        due = (length == slots).to(tl.int64)
        packed = due
        dropped = due * 0
        if WINDOW:
            keep_from = tl.maximum(position - window + 2, 0)
            newest = tl.load(positions + sequence * slots + sink_length + page_size - 1)
            packed = due * (newest >= keep_from).to(tl.int64)
            column = tl.arange(0, COLUMNS_PAD)
            ends = page_positions + (sequence * capacity + column) * page_size + page_size - 1
            stale = (tl.load(ends, mask=column < pages, other=0) < keep_from) & (column < pages)
            dropped += tl.sum(stale.to(tl.int32), 0)
        # Every thread has loaded the counters above, and one of them stores what follows.
        tl.debug_barrier()
        tl.store(counters + _LENGTH * batch, length - due * page_size)
        tl.store(counters + _PAGES * batch, pages + packed - dropped)
        tl.store(counters + _MEAN_KNOWN * batch, known | packed)
        if packed != 0:
            head = tl.arange(0, HEADS_PAD)
            begin = tl.load(positions + sequence * slots + sink_length)
            own = first + (sequence * heads + head) * capacity + pages
            tl.store(own, tl.zeros([HEADS_PAD], tl.int64) + begin, mask=head < heads)
        event = events + sequence * _EVENTS
        tl.store(event, due)
        tl.store(event + 1, tl.where(packed != 0, pages, -1))
        tl.store(event + 2, dropped)
        tl.store(event + 3, packed * (known == 0).to(tl.int64))


@triton.jit(do_not_specialize=["batch", "heads", "slots", "sink_length", "capacity"])
def commit_kernel(
    # This changes from launch to launch.
    events,
    # The state.
    state,
    keys,
    values,
    positions,
    page_positions,
    places,
    first,
    # Strides and sizes.
    key_b,
    key_h,
    key_n,
    value_b,
    value_h,
    value_n,
    batch,
    heads,
    slots,
    sink_length,
    capacity,
    # Constant sizes.
    PAGE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    PAGE_PAD: tl.constexpr,
    COLUMNS_PAD: tl.constexpr,
    BATCH_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    # Switches.
    WINDOW: tl.constexpr,
):
    """Carry out what a token has set off, and count the step; grid (rows, 3).

    Of the three programs of a row, one moves keys, one moves values, and one keeps the table. The one of the first row
    of a sequence keeps the positions too. Slots move down in ascending order, and threads wait for each other between
    reading and writing: what is written over was read by then.

    Args:
        events: int64 ``[B, 4]``.
        state: see :class:`~hf_kvcache.kernels.static_state.StaticState`; the numbers at its start are changed.
        keys: ``[B, heads, slots, KEY_DIM]``, changed.
        values: ``[B, heads, slots, VALUE_DIM]``, changed.
        positions: int64 ``[B, slots]``, changed.
        page_positions: int32 ``[B, capacity, PAGE]``, changed.
        places: int64 ``[rows, capacity]``, changed if pages leave the window.
        first: int64 ``[rows, capacity]``, changed.
        key_b: elements between sequences of ``keys``; the others likewise.
        batch: sequences.
        heads: KV heads.
        slots: slots of a sequence.
        sink_length: slots before those that move.
        capacity: pages that a row can hold.
        PAGE: tokens of a page.
        KEY_PAD: ``KEY_DIM`` rounded up to a power of two; the others likewise.
        BLOCK: slots, or pages, that move at a time.
        WINDOW: whether pages can leave a window.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence, head = row // heads, row % heads
    event = events + sequence * _EVENTS
    due, column, dropped = tl.load(event), tl.load(event + 1), tl.load(event + 2)
    moved = slots - sink_length - PAGE
    if part == 0:
        if due != 0:
            start = keys + sequence * key_b + head * key_h + sink_length * key_n
            _move_down(start, key_n, PAGE, moved, KEY_DIM, KEY_PAD, BLOCK)
    elif part == 1:
        if due != 0:
            start = values + sequence * value_b + head * value_h + sink_length * value_n
            _move_down(start, value_n, PAGE, moved, VALUE_DIM, VALUE_PAD, BLOCK)
    else:
        if WINDOW:  # noqa: SIM102 (this one is decided by the compiler)
            if dropped > 0:
                _roll(places + row * capacity, dropped, capacity, COLUMNS_PAD)
                _roll(first + row * capacity, dropped, capacity, COLUMNS_PAD)
        if head == 0:
            own = positions + sequence * slots + sink_length
            paged = page_positions + sequence * capacity * PAGE
            token = tl.arange(0, PAGE_PAD)
            if column >= 0:
                at = tl.load(own + token, mask=token < PAGE, other=0)
                tl.store(paged + column * PAGE + token, at.to(tl.int32), mask=token < PAGE)
                tl.debug_barrier()
            if due != 0:
                _move_down(own, 1, PAGE, moved, 1, 1, BLOCK)
            if WINDOW:  # noqa: SIM102
                if dropped > 0:
                    pages = tl.load(state + _HEADER + _PAGES * batch + sequence)
                    _move_down(paged, PAGE, dropped, pages, PAGE, PAGE_PAD, 16)
    if row + part == 0:
        number = tl.arange(0, BATCH_PAD)
        changed = tl.load(events + number * _EVENTS + 1, mask=number < batch, other=-1) >= 0
        changed = changed | (tl.load(events + number * _EVENTS + 2, mask=number < batch, other=0) > 0)
        tl.store(state + 1, tl.load(state + 1) + tl.max(changed.to(tl.int32), 0))
        tl.store(state, tl.load(state) + 1)


@triton.jit
def _move_down(start, stride, by, count, DIM: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr):
    """Move ``count`` vectors ``[DIM]`` at ``start`` from where they are, ``by`` vectors further on, to ``start``."""
    channel = tl.arange(0, PAD)[None, :]
    for begin in range(0, count, BLOCK):
        number = begin + tl.arange(0, BLOCK)
        inside = (number < count)[:, None] & (channel < DIM)
        to = number.to(tl.int64)[:, None] * stride + channel
        x = tl.load(start + by * stride + to, mask=inside, other=0)
        tl.debug_barrier()
        tl.store(start + to, x, mask=inside)


@triton.jit
def _roll(start, by, count, PAD: tl.constexpr):
    """Move ``count`` numbers at ``start`` down ``by`` places, the first ones to the end."""
    number = tl.arange(0, PAD)
    x = tl.load(start + (number + by) % count, mask=number < count, other=0)
    tl.debug_barrier()
    tl.store(start + number, x, mask=number < count)
