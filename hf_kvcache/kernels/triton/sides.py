"""One side of a page inside Triton kernels: its compile-time description, and the functions that read it.

A row of codes is unpacked segment by segment, and a segment whose width is no power of two is padded to the next one.
So kernels see channels in *padded order*: place ``s * segment_pad + j`` is channel ``s * segment + j`` if ``j <
segment``, and else padding. If the head dimension is a power of two, padded order is the order of the channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.page import BIAS, PageLayout
from hf_kvcache.kernels.reference.pack import bit_planes
from hf_kvcache.kernels.triton.unpack import unpacking, with_scales

TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


#: Fewest tokens and channels that a dot product takes.
_LEAST = 16


@dataclass(frozen=True)
class Side:
    """The compile-time description of a side.

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
        bias_at: that of the bias per token, which is told of the keys; 0 if there is none.
        table: the levels of ``level="table"``.
        element: element type of ``level="dense"``.
        compute: type in which dot products take this side.
        precision: how dot products of fp32 are to be done.
        middle: what is subtracted from codes that are summed over tokens in half precision; zero points add it again.
            The rounding errors of the weights are multiplied by the codes. With a mean that all codes share they would
            be alike in all channels, and the rotation back would gather them in the first channel.
        assembly: what unpacks four bytes of codes on NVIDIA's GPUs, from :mod:`~hf_kvcache.kernels.triton.unpack`;
            empty where there is none.
        scaling: whether the assembly applies scales too. Then it gives the elements, and else levels.
        constraints: the constraints of the assembly.
        unit: what is to be multiplied by the numbers of :func:`load_levels`.
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
    bias_at: int
    table: tuple[float, ...]
    element: Any
    compute: Any
    precision: str
    middle: int
    assembly: str
    scaling: bool
    constraints: str
    unit: float

    @property
    def dim_pad(self) -> int:
        return self.segments * self.segment_pad

    @property
    def product_unit(self) -> float:
        """What dot products with folded keys, scales included, are still to be multiplied by."""
        return self.unit if self.folded else 1.0

    @property
    def sum_unit(self) -> float:
        """What weighted sums of folded values, scales included, are still to be multiplied by."""
        return self.unit if self.folded and not self.channel and not self.other else 1.0


def describe_side(
    layout: PageLayout, name: str, compute: Any, fold: bool, precision: str = "ieee", weighed: bool = False
) -> Side:
    """The compile-time description of side ``name`` of a layout.

    Args:
        layout: the layout of the records.
        name: ``"keys"`` or ``"values"``.
        compute: Triton type in which dot products take this side.
        fold: whether to fold the scales if a whole page or row shares them.
        precision: how dot products of fp32 are to be done, as in ``tl.dot``.
        weighed: whether the side is summed over tokens, as values are.
    """
    fmt = layout.sides[name]
    offsets = [
        layout.fields[f"{name}.{field}"].offset if f"{name}.{field}" in layout.fields else 0
        for field in ("codes", "scale", "zero", "other")
    ]
    segments = 1 if fmt.level == "dense" else 8 // bit_planes(fmt.bits)[0]
    whole = fmt.group == (layout.page_size if fmt.axis == "channel" else fmt.dim)
    folded = fmt.level != "dense" and whole and fold
    centered = weighed and folded and fmt.zero and fmt.level == "integer" and compute == tl.float16
    middle = 1 << (fmt.bits - 1) if centered else 0
    # Only NVIDIA's GPUs have this precision, and only they have the instructions.
    known = precision == "tf32x3" and compute == tl.float16
    unpack = unpacking(fmt.level, fmt.bits, fmt.table, middle) if known and fmt.level != "dense" else None
    scaling = unpack is not None and whole and not folded
    if unpack is not None and scaling:
        unpack = with_scales(unpack, segments, fmt.zero, fmt.other)
    return Side(
        dim=fmt.dim,
        segments=segments,
        segment=fmt.dim // segments,
        segment_pad=triton.next_power_of_2(fmt.dim // segments),
        page=layout.page_size,
        page_pad=max(_LEAST, triton.next_power_of_2(layout.page_size)),
        bits=fmt.bits,
        level=fmt.level,
        channel=fmt.axis == "channel",
        group=fmt.group,
        folded=folded,
        zero=fmt.level != "dense" and fmt.zero,
        other=fmt.level != "dense" and fmt.other,
        codes_at=offsets[0],
        scale_at=offsets[1],
        zero_at=offsets[2],
        other_at=offsets[3],
        bias_at=layout.fields[BIAS].offset if layout.biased and name == "keys" else 0,
        table=fmt.table,
        element=None if fmt.dense_dtype is None else TRITON_TYPES[fmt.dense_dtype],
        compute=compute,
        precision=precision,
        middle=middle,
        assembly="" if unpack is None else unpack.text,
        scaling=scaling,
        constraints="" if unpack is None else unpack.constraints,
        unit=1.0 if unpack is None else unpack.unit,
    )


@lru_cache(maxsize=32)
def level_tables(keys: tuple[float, ...], values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """fp32 ``[2, 16]``: the levels of keys and of values, padded with 0."""
    # A cached tensor made under inference_mode could not be used outside it.
    with torch.inference_mode(False):
        padded = [list(table) + [0.0] * (16 - len(table)) for table in (keys, values)]
        return torch.tensor(padded, dtype=torch.float32, device=device)


@triton.jit
def channels(side: tl.constexpr):
    """The channel at each place of the padded order, and whether there is one."""
    place = tl.arange(0, side.segments * side.segment_pad)
    j = place % side.segment_pad
    return place // side.segment_pad * side.segment + j, j < side.segment


@triton.jit
def load_tile(pointer, offsets, held, there, masked: tl.constexpr):
    """Elements ``[N, S]`` of the first ``held`` rows and of the columns ``there [S]``, 0 elsewhere."""
    if masked:
        keep = tl.arange(0, offsets.shape[0]) < held
        return tl.load(pointer + offsets, mask=keep[:, None] & there[None, :], other=0)
    else:
        return tl.load(pointer + offsets)


@triton.jit
def load_codes(record, first, held, side: tl.constexpr, n: tl.constexpr, masked: tl.constexpr):
    """Codes uint8 ``[n, dim_pad]`` of ``n`` tokens of a record, in padded order.

    Args:
        record: uint8 pointer to the record.
        first: the first of the tokens.
        held: how many of them to read; the codes of the others are 0.
        side: description of the side.
        n: number of tokens.
        masked: whether ``held`` may be less than ``n``.
    """
    low, high = load_planes(record, first, held, side, n, masked)
    shift = tl.arange(0, side.segment_pad)
    if side.bits == 3:
        shift = shift // (side.dim // 8)
    if side.segments == 1:
        return low
    elif side.segments == 2:
        return in_order(_code(low, high, shift, 0, side), _code(low, high, shift, 1, side), n, side)
    elif side.segments == 4:
        return four_in_order(
            _code(low, high, shift, 0, side),
            _code(low, high, shift, 1, side),
            _code(low, high, shift, 2, side),
            _code(low, high, shift, 3, side),
            n,
            side,
        )
    else:
        even = tl.join(_two_codes(low, high, shift, 0, side), _two_codes(low, high, shift, 2, side))
        odd = tl.join(_two_codes(low, high, shift, 1, side), _two_codes(low, high, shift, 3, side))
        return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 4, 1)), [n, 8 * side.segment_pad])


@triton.jit
def load_levels(record, first, held, table, side: tl.constexpr, n: tl.constexpr, masked: tl.constexpr):
    """The numbers in the type of computation ``[n, dim_pad]`` that codes stand for, before scaling.

    They are to be multiplied by ``side.unit``. Arguments as for :func:`load_elements`.
    """
    if side.assembly == "":
        return levels_of(load_codes(record, first, held, side, n, masked), table, side, side.compute)
    else:
        low, high = load_planes(record, first, held, side, n, masked)
        return _unpack(low, high, side, n)


@triton.jit
def _unpack(low, high, side: tl.constexpr, n: tl.constexpr):
    """What :func:`load_levels` gives, from the bytes of the planes, by assembly."""
    odd = odd_bytes(side, n)
    if side.segments == 1:
        return tl.inline_asm_elementwise(side.assembly, side.constraints, [low, high, odd], tl.float16, True, 4)
    elif side.segments == 2:
        a, b = tl.inline_asm_elementwise(
            side.assembly, side.constraints, [low, high, odd], (tl.float16, tl.float16), True, 4
        )
        return in_order(a, b, n, side)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            side.assembly,
            side.constraints,
            [low, high, odd],
            (tl.float16, tl.float16, tl.float16, tl.float16),
            True,
            4,
        )
        return four_in_order(a, b, c, d, n, side)


@triton.jit
def odd_bytes(side: tl.constexpr, n: tl.constexpr):
    """Of 3 bits, 255 at the bytes ``[n, segment_pad]`` whose odd bits count, and else 0.

    For others it is an operand that nothing reads. As it is no load, it keeps the compiler from reading every byte of
    the values on its own, in the order in which dot products take them.
    """
    odd = tl.where(tl.arange(0, side.segment_pad) // (side.dim // 8) % 2 == 1, 255, 0).to(tl.uint8)
    return tl.broadcast_to(odd[None, :], [n, side.segment_pad])


@triton.jit
def load_planes(record, first, held, side: tl.constexpr, n: tl.constexpr, masked: tl.constexpr):
    """The bytes ``[n, segment_pad]`` with the codes' low bits, and for 3 bits those with their high bits."""
    row_bytes: tl.constexpr = side.dim * side.bits // 8
    some: tl.constexpr = masked or side.segment != side.segment_pad
    j = tl.arange(0, side.segment_pad)
    there = j < side.segment
    rows = (first + tl.arange(0, n))[:, None] * row_bytes
    if row_bytes == side.segment_pad:
        # Flat, so that loads have their full width for rows of any length.
        low = _load_flat(record + side.codes_at + first * row_bytes, n * row_bytes, held * row_bytes, masked)
        low = tl.reshape(low, [n, side.segment_pad])
    else:
        low = load_tile(record + side.codes_at, rows + j[None, :], held, there, some)
    high = low
    if side.bits == 3:
        # The high bits of neighbors are neighbors too, in rows of dim / 8 bytes.
        eighth: tl.constexpr = side.dim // 8
        high = load_tile(record + side.codes_at + side.segment, rows + (j % eighth)[None, :], held, there, some)
    return low, high


@triton.jit
def in_order(a, b, n: tl.constexpr, side: tl.constexpr):
    """Both segments ``[n, segment_pad]`` of a row, one behind the other."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), [n, 2 * side.segment_pad])


@triton.jit
def four_in_order(a, b, c, d, n: tl.constexpr, side: tl.constexpr):
    """The four segments ``[n, segment_pad]`` of a row, one behind the other."""
    four = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(tl.permute(four, (0, 2, 3, 1)), [n, 4 * side.segment_pad])


@triton.jit
def _load_flat(pointer, count: tl.constexpr, held, masked: tl.constexpr):
    """The first ``held`` of ``count`` elements, 0 for the rest."""
    i = tl.arange(0, count)
    if masked:
        return tl.load(pointer + i, mask=i < held, other=0)
    else:
        return tl.load(pointer + i)


@triton.jit
def _two_codes(low, high, high_shift, first: tl.constexpr, side: tl.constexpr):
    """The codes of segment ``first`` and of that half of the segments further on, side by side in a last dimension."""
    half: tl.constexpr = side.segments // 2
    return tl.join(_code(low, high, high_shift, first, side), _code(low, high, high_shift, first + half, side))


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
    """The levels of a side in its type of computation, from fp32 ``tables``; zeros for a side without a table."""
    if side.level == "table":
        return tl.load(tables + tl.arange(0, 16)).to(side.compute)
    else:
        return tl.zeros([16], side.compute)


@triton.jit
def levels_of(code, table, side: tl.constexpr, compute: tl.constexpr):
    """The numbers in type ``compute`` that codes uint8 ``[N, dim_pad]`` stand for, less the middle, before scaling."""
    if side.level == "table":
        # Flat: then the compiler looks up in shared memory. In two dimensions it shuffles registers, which takes three
        # times as many instructions.
        flat = tl.reshape(code, [code.shape[0] * code.shape[1]]).to(tl.int32)
        return tl.reshape(tl.gather(table, flat, 0), [code.shape[0], code.shape[1]]).to(compute)
    elif side.level == "float8":
        # e4m3 has the layout of half precision with three bits less of exponent, so the same bits are a number that is
        # 2**8 times too small. All GPUs can do this, and unlike the conversion it is right in the interpreter.
        bits = ((code & 0x80).to(tl.uint16) << 8) | ((code & 0x7F).to(tl.uint16) << 7)
        return bits.to(tl.float16, bitcast=True).to(compute) * 256.0
    elif compute == tl.float16:
        # 1024 + code has the code in its lowest bits: cheaper than a conversion.
        return (code.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + side.middle)
    else:
        return code.to(compute)


@triton.jit
def load_per_channel(record, at: tl.constexpr, channel, there, held, side: tl.constexpr, masked: tl.constexpr):
    """A field of one number per channel as fp32 ``[dim_pad]``, 0 where there is no channel or nothing is held."""
    pointer = (record + at).to(tl.pointer_type(tl.float16))
    if masked or side.segment != side.segment_pad:
        # Without a page there is no memory to read.
        some = held + tl.zeros_like(channel) > 0  # a vector: the interpreter makes no mask of a scalar and a vector
        return tl.load(pointer + channel, mask=there & some, other=0.0).to(tl.float32)
    elif at % 4 != 0:
        return tl.load(pointer + channel).to(tl.float32)
    else:
        # Two at a time: the compiler pipelines loads of 4 bytes, and no shorter ones.
        words = tl.load(pointer.to(tl.pointer_type(tl.int32)) + tl.arange(0, side.dim // 2))
        return tl.interleave(half_of(words, 0), half_of(words, 16)).to(tl.float32)


@triton.jit
def load_per_token(record, at: tl.constexpr, first, held, n: tl.constexpr, masked: tl.constexpr):
    """A field of one number per token as fp32 ``[n]``, 0 behind the first ``held``."""
    pointer = (record + at).to(tl.pointer_type(tl.float16)) + first
    if masked or at % 4 != 0:
        return _load_flat(pointer, n, held, masked).to(tl.float32)
    else:
        # As in load_per_channel, but neighbors are in different threads: each of them loads both.
        token = tl.arange(0, n)
        words = tl.load(pointer.to(tl.pointer_type(tl.int32)) + token // 2)
        return half_of(words, token % 2 * 16).to(tl.float32)


@triton.jit
def half_of(words, shift):
    """The numbers in half precision that begin at bit ``shift`` of int32 ``words``."""
    return (words >> shift).to(tl.int16).to(tl.float16, bitcast=True)
