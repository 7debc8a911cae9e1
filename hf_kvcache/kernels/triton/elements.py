"""Decoded tokens of a page inside Triton kernels: codes with all scales applied, element by element."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_kvcache.kernels.triton.sides import (
    four_in_order,
    half_of,
    in_order,
    levels_of,
    load_codes,
    load_per_channel,
    load_per_token,
    load_planes,
    load_tile,
    odd_bytes,
)


@triton.jit
def load_elements(
    record, first, held, table, channel, there, side: tl.constexpr, n: tl.constexpr, masked: tl.constexpr
):
    """Decoded tokens in the type of computation ``[n, dim_pad]``, with all scales applied.

    Args:
        record: uint8 pointer to the record.
        first: the first of the tokens.
        held: how many of them to read; the others are 0.
        table: what :func:`load_table` gave.
        channel: int32 ``[dim_pad]`` from :func:`channels`.
        there: bool ``[dim_pad]`` from :func:`channels`.
        side: description of the side.
        n: number of tokens.
        masked: whether ``held`` may be less than ``n``.
    """
    if side.level == "dense":
        some: tl.constexpr = masked or side.segment != side.segment_pad
        elements = (record + side.codes_at).to(tl.pointer_type(side.element))
        rows = (first + tl.arange(0, n))[:, None] * side.dim + channel[None, :]
        return load_tile(elements, rows, held, there, some).to(side.compute)
    elif side.scaling:
        return _decode(record, first, held, side, n, masked)
    else:
        x = levels_of(load_codes(record, first, held, side, n, masked), table, side, tl.float32)
        x = x * _load_cells(record, side.scale_at, first, held, channel, there, side, n, masked)
        if side.zero:
            x = x + _load_cells(record, side.zero_at, first, held, channel, there, side, n, masked)
        if side.other:
            if side.channel:
                x = x * load_per_token(record, side.other_at, first, held, n, masked)[:, None]
            else:
                x = x * load_per_channel(record, side.other_at, channel, there, held, side, masked)[None, :]
        return x.to(side.compute)


@triton.jit
def _load_cells(
    record,
    at: tl.constexpr,
    first,
    held,
    channel,
    there,
    side: tl.constexpr,
    n: tl.constexpr,
    masked: tl.constexpr,
):
    """A field that groups of tokens or channels share, as fp32 that broadcasts to ``[n, dim_pad]``."""
    some: tl.constexpr = masked or side.segment != side.segment_pad
    fields = (record + at).to(tl.pointer_type(tl.float16))
    token = first + tl.arange(0, n)
    if side.channel:
        if side.group == side.page:
            return load_per_channel(record, at, channel, there, held, side, masked)[None, :]
        else:
            cells = (token // side.group * side.dim)[:, None] + channel[None, :]
            return load_tile(fields, cells, held, there, some).to(tl.float32)
    else:
        if side.group == side.dim:
            return load_per_token(record, at, first, held, n, masked)[:, None]
        else:
            groups: tl.constexpr = side.dim // side.group
            cells = (token * groups)[:, None] + (channel // side.group)[None, :]
            return load_tile(fields, cells, held, there, some).to(tl.float32)


@triton.jit
def _decode(record, first, held, side: tl.constexpr, n: tl.constexpr, masked: tl.constexpr):
    """What :func:`load_elements` gives, in half precision, by assembly that applies the scales."""
    low, high = load_planes(record, first, held, side, n, masked)
    odd = odd_bytes(side, n)
    if side.segments == 1:
        scale, zero, other = _cells(record, first, held, side, 0, n, masked)
        return tl.inline_asm_elementwise(
            side.assembly, side.constraints, [low, high, odd, scale, zero, other], tl.float16, True, 4
        )
    elif side.segments == 2:
        scale_a, zero_a, other_a = _cells(record, first, held, side, 0, n, masked)
        scale_b, zero_b, other_b = _cells(record, first, held, side, 1, n, masked)
        a, b = tl.inline_asm_elementwise(
            side.assembly,
            side.constraints,
            [low, high, odd, scale_a, scale_b, zero_a, zero_b, other_a, other_b],
            (tl.float16, tl.float16),
            True,
            4,
        )
        return in_order(a, b, n, side)
    else:
        scale_a, zero_a, other_a = _cells(record, first, held, side, 0, n, masked)
        scale_b, zero_b, other_b = _cells(record, first, held, side, 1, n, masked)
        scale_c, zero_c, other_c = _cells(record, first, held, side, 2, n, masked)
        scale_d, zero_d, other_d = _cells(record, first, held, side, 3, n, masked)
        a, b, c, d = tl.inline_asm_elementwise(
            side.assembly,
            side.constraints,
            [
                low,
                high,
                odd,
                scale_a,
                scale_b,
                scale_c,
                scale_d,
                zero_a,
                zero_b,
                zero_c,
                zero_d,
                other_a,
                other_b,
                other_c,
                other_d,
            ],
            (tl.float16, tl.float16, tl.float16, tl.float16),
            True,
            4,
        )
        return four_in_order(a, b, c, d, n, side)


@triton.jit
def _cells(record, first, held, side: tl.constexpr, segment: tl.constexpr, n: tl.constexpr, masked: tl.constexpr):
    """Scale, zero point and second scale of a segment, in half precision; anything for what there is not."""
    if side.channel:
        scale = _of_channels(record, side.scale_at, held, side, segment, masked)
    else:
        scale = load_per_token(record, side.scale_at, first, held, n, masked).to(tl.float16)[:, None]
    zero = scale
    if side.zero:
        if side.channel:
            zero = _of_channels(record, side.zero_at, held, side, segment, masked)
        else:
            zero = load_per_token(record, side.zero_at, first, held, n, masked).to(tl.float16)[:, None]
    other = scale
    if side.other:
        if side.channel:
            other = load_per_token(record, side.other_at, first, held, n, masked).to(tl.float16)[:, None]
        else:
            other = _of_channels(record, side.other_at, held, side, segment, masked)
    return scale, zero, other


@triton.jit
def _of_channels(record, at: tl.constexpr, held, side: tl.constexpr, segment: tl.constexpr, masked: tl.constexpr):
    """A field of one number per channel as fp16 ``[1, segment_pad]``, of the channels of a segment; 0 elsewhere."""
    begin: tl.constexpr = at + 2 * segment * side.segment
    pointer = (record + begin).to(tl.pointer_type(tl.float16))
    j = tl.arange(0, side.segment_pad)
    if masked or side.segment != side.segment_pad:
        # Without a page there is no memory to read.
        some = held + tl.zeros_like(j) > 0  # a vector: the interpreter makes no mask of a scalar and a vector
        return tl.load(pointer + j, mask=(j < side.segment) & some, other=0.0)[None, :]
    elif begin % 4 != 0:
        return tl.load(pointer + j)[None, :]
    else:
        # Two at a time: the compiler pipelines loads of 4 bytes, and no shorter ones.
        words = tl.load(pointer.to(tl.pointer_type(tl.int32)) + tl.arange(0, side.segment // 2))
        return tl.interleave(half_of(words, 0), half_of(words, 16))[None, :]
