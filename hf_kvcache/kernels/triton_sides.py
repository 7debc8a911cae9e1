"""One side of a page inside Triton kernels: what is known at compile time, and the functions that read it.

A row of codes is unpacked segment by segment, and a segment that is no power of two wide is padded to one. So kernels see
channels in *padded order*: place ``s * segment_pad + j`` is channel ``s * segment + j``, or nothing where ``j`` is not
below ``segment``. Where the head dimension is a power of two that is the natural order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.pack.reference import bit_planes
from hf_kvcache.kernels.page import PageLayout

TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Side:
    """Compile-time description of a side.

    Attributes:
        dim: width of a token's vector.
        segments: segments of the widest bit plane of a row.
        segment: channels of a segment.
        segment_pad: the same, rounded up to a power of two.
        page: tokens of a page.
        page_pad: the same, rounded up to a power of two.
        bits: bits of a code.
        level: as in :class:`~hf_kvcache.kernels.page.SideFormat`.
        channel: whether ``scale`` and ``zero`` are per channel; else per token.
        group: tokens or channels that share a scale.
        folded: whether scales are applied to queries, scores, weights and outputs; else to the elements.
        zero: whether there are zero points.
        other: whether there is a second scale, across.
        codes_at: byte offset of the codes in a record.
        scale_at: that of the scales.
        zero_at: that of the zero points.
        other_at: that of the second scales.
        table: the levels of ``level="table"``.
        element: element type of ``level="dense"``.
        compute: type in which dot products take this side.
    """

    dim: int
    segments: int
    segment: int
    segment_pad: int
    page: int
    page_pad: int
    bits: int
    level: str
    channel: bool
    group: int
    folded: bool
    zero: bool
    other: bool
    codes_at: int
    scale_at: int
    zero_at: int
    other_at: int
    table: tuple[float, ...]
    element: Any
    compute: Any

    @property
    def dim_pad(self) -> int:
        return self.segments * self.segment_pad


def describe_side(layout: PageLayout, name: str, compute: Any, fold: bool) -> Side:
    """The compile-time description of side ``name`` of a layout.

    Args:
        layout: the layout of the records.
        name: ``"keys"`` or ``"values"``.
        compute: Triton type in which dot products take this side.
        fold: whether scales shall be folded where a whole page or row shares them.
    """
    fmt = layout.sides[name]
    offsets = [
        layout.fields[f"{name}.{field}"].offset if f"{name}.{field}" in layout.fields else 0
        for field in ("codes", "scale", "zero", "other")
    ]
    segments = 1 if fmt.level == "dense" else 8 // bit_planes(fmt.bits)[0]
    whole = fmt.group == (layout.page_size if fmt.axis == "channel" else fmt.dim)
    return Side(
        dim=fmt.dim,
        segments=segments,
        segment=fmt.dim // segments,
        segment_pad=triton.next_power_of_2(fmt.dim // segments),
        page=layout.page_size,
        page_pad=triton.next_power_of_2(layout.page_size),
        bits=fmt.bits,
        level=fmt.level,
        channel=fmt.axis == "channel",
        group=fmt.group,
        folded=fmt.level != "dense" and whole and fold,
        zero=fmt.level != "dense" and fmt.zero,
        other=fmt.level != "dense" and fmt.other,
        codes_at=offsets[0],
        scale_at=offsets[1],
        zero_at=offsets[2],
        other_at=offsets[3],
        table=fmt.table,
        element=None if fmt.dense_dtype is None else TRITON_TYPES[fmt.dense_dtype],
        compute=compute,
    )


@triton.jit
def channels(side: tl.constexpr):
    """The channel at each place of the padded order, and whether there is one."""
    place = tl.arange(0, side.segments * side.segment_pad)
    if side.segment == side.segment_pad:
        return place, place >= 0
    j = place % side.segment_pad
    return place // side.segment_pad * side.segment + j, j < side.segment


@triton.jit
def load_tile(pointer, offsets, keep, there, masked: tl.constexpr):
    """Elements ``[N, S]`` of rows where ``keep [N]`` and columns where ``there [S]``, 0 elsewhere."""
    if masked:
        return tl.load(pointer + offsets, mask=keep[:, None] & there[None, :], other=0)
    return tl.load(pointer + offsets)


@triton.jit
def load_codes(record, token, keep, side: tl.constexpr, masked: tl.constexpr):
    """Codes uint8 ``[N, dim_pad]`` of the tokens ``token [N]`` of a record, in padded order.

    Args:
        record: uint8 pointer to the record.
        token: int32 ``[N]``.
        keep: bool ``[N]``; nothing is read where it is False.
        side: description of the side.
        masked: whether ``keep`` may be False anywhere.
    """
    row_bytes: tl.constexpr = side.dim * side.bits // 8
    width: tl.constexpr = 8 // side.segments
    some: tl.constexpr = masked or side.segment != side.segment_pad
    n: tl.constexpr = token.shape[0]
    j = tl.arange(0, side.segment_pad)
    there = j < side.segment
    rows = token[:, None] * row_bytes
    low = load_tile(record + side.codes_at, rows + j[None, :], keep, there, some)
    if side.segments == 1:
        return low
    high = low
    high_shift = j
    if side.bits == 3:
        # The high bits of neighbours are neighbours too, and come around every dim / 8 bytes.
        eighth: tl.constexpr = side.dim // 8
        high = load_tile(record + side.codes_at + side.segment, rows + (j % eighth)[None, :], keep, there, some)
        high_shift = j // eighth
    if side.segments == 2:
        both = tl.join(_code(low, high, high_shift, 0, side), _code(low, high, high_shift, 1, side))
        return tl.reshape(tl.permute(both, (0, 2, 1)), [n, 2 * side.segment_pad])
    if side.segments == 4:
        even = tl.join(_code(low, high, high_shift, 0, side), _code(low, high, high_shift, 2, side))
        odd = tl.join(_code(low, high, high_shift, 1, side), _code(low, high, high_shift, 3, side))
        return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 1)), [n, 4 * side.segment_pad])
    tl.static_assert(width == 1)
    a = tl.join(_code(low, high, high_shift, 0, side), _code(low, high, high_shift, 4, side))
    b = tl.join(_code(low, high, high_shift, 1, side), _code(low, high, high_shift, 5, side))
    c = tl.join(_code(low, high, high_shift, 2, side), _code(low, high, high_shift, 6, side))
    d = tl.join(_code(low, high, high_shift, 3, side), _code(low, high, high_shift, 7, side))
    eight = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(tl.permute(eight, (0, 2, 3, 4, 1)), [n, 8 * side.segment_pad])


@triton.jit
def _code(low, high, high_shift, segment: tl.constexpr, side: tl.constexpr):
    """The codes of one segment from the bytes that hold them."""
    width: tl.constexpr = 8 // side.segments
    code = (low >> (segment * width)) & ((1 << width) - 1)
    if side.bits == 3:
        shift = (high_shift + segment * 2).to(tl.uint8)
        code = code | (((high >> shift[None, :]) & 1) << 2)
    return code


@triton.jit
def load_table(tables, side: tl.constexpr):
    """The levels of a side in its type of computation, from fp32 ``tables``; anything where it has none."""
    return tl.load(tables + tl.arange(0, 16)).to(side.compute)


@triton.jit
def levels_of(code, table, side: tl.constexpr, compute: tl.constexpr):
    """The numbers in type ``compute`` that codes uint8 ``[N, dim_pad]`` stand for, before scaling."""
    if side.level == "table":
        # Flat, since the compiler then looks up in shared memory: in two dimensions it shuffles registers, three times
        # as many instructions.
        flat = tl.reshape(code, [code.shape[0] * code.shape[1]]).to(tl.int32)
        return tl.reshape(tl.gather(table, flat, 0), [code.shape[0], code.shape[1]]).to(compute)
    if side.level == "float8":
        # e4m3 is half precision without three of the exponent's bits: the same bits stand for a number 2**8 times too
        # small. All GPUs can do this, and unlike the conversion it is right in the interpreter.
        bits = ((code & 0x80).to(tl.uint16) << 8) | ((code & 0x7F).to(tl.uint16) << 7)
        return bits.to(tl.float16, bitcast=True).to(compute) * 256.0
    if compute == tl.float16:
        # 1024 + code has the code in its lowest bits: cheaper than a conversion.
        return (code.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
    return code.to(compute)


@triton.jit
def load_per_channel(record, at: tl.constexpr, channel, there, side: tl.constexpr):
    """A field of one number per channel as fp32 ``[dim_pad]``, 0 where there is no channel."""
    pointer = (record + at).to(tl.pointer_type(tl.float16))
    if side.segment == side.segment_pad:
        return tl.load(pointer + channel).to(tl.float32)
    return tl.load(pointer + channel, mask=there, other=0.0).to(tl.float32)


@triton.jit
def load_per_token(record, at: tl.constexpr, token, keep, masked: tl.constexpr):
    """A field of one number per token as fp32 ``[N]``, 0 where ``keep`` is False."""
    pointer = (record + at).to(tl.pointer_type(tl.float16))
    if masked:
        return tl.load(pointer + token, mask=keep, other=0.0).to(tl.float32)
    return tl.load(pointer + token).to(tl.float32)


@triton.jit
def load_elements(record, token, keep, table, channel, there, side: tl.constexpr, masked: tl.constexpr):
    """Decoded tokens in the type of computation ``[N, dim_pad]``, with all scales applied.

    Args:
        record: uint8 pointer to the record.
        token: int32 ``[N]``.
        keep: bool ``[N]``; 0 is returned where it is False.
        table: what :func:`load_table` gave.
        channel: int32 ``[dim_pad]`` from :func:`channels`.
        there: bool ``[dim_pad]`` from :func:`channels`.
        side: description of the side.
        masked: whether ``keep`` may be False anywhere.
    """
    some: tl.constexpr = masked or side.segment != side.segment_pad
    if side.level == "dense":
        elements = (record + side.codes_at).to(tl.pointer_type(side.element))
        rows = token[:, None] * side.dim + channel[None, :]
        return load_tile(elements, rows, keep, there, some).to(side.compute)
    x = levels_of(load_codes(record, token, keep, side, masked), table, side, tl.float32)
    if side.channel:
        cells = (token // side.group * side.dim)[:, None] + channel[None, :]
    else:
        groups: tl.constexpr = side.dim // side.group
        cells = (token * groups)[:, None] + (channel // side.group)[None, :]
    scales = (record + side.scale_at).to(tl.pointer_type(tl.float16))
    x = x * load_tile(scales, cells, keep, there, some).to(tl.float32)
    if side.zero:
        zeros = (record + side.zero_at).to(tl.pointer_type(tl.float16))
        x = x + load_tile(zeros, cells, keep, there, some).to(tl.float32)
    if side.other:
        if side.channel:
            x = x * load_per_token(record, side.other_at, token, keep, masked)[:, None]
        else:
            x = x * load_per_channel(record, side.other_at, channel, there, side)[None, :]
    return x.to(side.compute)
