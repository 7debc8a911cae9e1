"""One side of a page as the encoding kernel sees it, and the parts of that kernel that all methods share.

A program holds a tile of some tokens in registers. Its columns are *places*, an order of the channels in which the
codes of a byte stand side by side. The rotation is a matrix product on the matrix units, whose columns may come in any
order: the places are the columns of the matrix.

A row of codes has :attr:`EncodedSide.segments` segments (8 for 3 bits, whose two planes have 4 and 8). The channel at
place ``p`` is number ``p // segments`` of the segment that ``p % segments`` stands for, which is that number itself,
but for 3 bits ``2 * (p % 4) + p // 4 % 2``.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.page import ALIGNMENT, PageLayout, Rotation
from hf_kvcache.kernels.reference.hadamard import rotation_matrix
from hf_kvcache.kernels.reference.pack import bit_planes
from hf_kvcache.kernels.triton.sides import TRITON_TYPES

#: Fewest tokens and channels that a dot product takes.
LEAST = 16
#: Elements that a program holds at a time, if the method lets it choose: 32 in each of 512 threads.
ELEMENTS = 128 * 128
#: Elements that a program may hold at most. Registers spill with more than :data:`ELEMENTS`.
MOST_ELEMENTS = 2 * ELEMENTS
#: Channels of the unrotated vectors that a step of the matrix product takes, at most.
_MOST_DEPTH = 128
#: Methods that look at all tokens of a page together.
WHOLE_PAGES = ("unbiased_keys", "kvarn")
_SCALE_MAX = tl.constexpr(65504.0)


@dataclass(frozen=True)
class EncodedSide:
    """The compile-time description of a side that is encoded.

    Attributes:
        method: name of the encoding, as in the codecs' ``method``.
        dim: width of a token's vector.
        dim_pad: the same, rounded up to a power of two.
        segments: segments of a row, see above.
        page: tokens of a page.
        tokens: tokens of a program. They are a group where scales are per channel.
        block: the same, rounded up to a power of two.
        blocks: programs of a page.
        bits: bits of a code.
        channel: whether ``scale`` and ``zero`` are per channel; else per token.
        group: tokens or channels that share a scale.
        codes_at: byte offset of the codes in a record.
        scale_at: that of the scales.
        zero_at: that of the zero points.
        other_at: that of the second scales.
        paddings: where fields end that have padding behind them.
        levels: the positive levels of a table, see :func:`marked_levels`.
        edges: the middles between them.
        element: element type of dense pages.
        rotated: whether vectors are multiplied with a rotation first.
        centered: whether a key mean is subtracted then.
        depth: channels of the unrotated vectors that a step of the matrix product takes.
        operand: type in which that product takes vectors and signs.
    """

    method: str
    dim: int
    dim_pad: int
    segments: int
    page: int
    tokens: int
    block: int
    blocks: int
    bits: int
    channel: bool
    group: int
    codes_at: int
    scale_at: int
    zero_at: int
    other_at: int
    paddings: tuple[int, ...]
    levels: tuple[float, ...]
    edges: tuple[float, ...]
    element: Any
    rotated: bool
    centered: bool
    depth: int
    operand: Any

    @property
    def segment(self) -> int:
        """Channels of a segment."""
        return self.dim // self.segments

    @property
    def turned(self) -> bool:
        """Whether tiles are ``[dim_pad, block]``: a thread then holds few channels and many tokens of a tile."""
        return self.method == "unbiased_keys"

    @property
    def full(self) -> bool:
        """Whether all of a program's tile is tokens and channels."""
        return self.dim == self.dim_pad and self.tokens == self.block and self.page % self.tokens == 0


def describe(layout: PageLayout, name: str, method: str, dtype: torch.dtype, arch: str) -> EncodedSide:
    """The compile-time description of side ``name`` of a layout, for vectors of a dtype.

    Args:
        layout: the layout of the records.
        name: ``"keys"`` or ``"values"``.
        method: name of the encoding.
        dtype: of the vectors that are encoded.
        arch: the architecture.
    """
    fmt, page = layout.sides[name], layout.page_size
    dim_pad = max(LEAST, triton.next_power_of_2(fmt.dim))
    channel = fmt.level != "dense" and fmt.axis == "channel"
    whole = method in WHOLE_PAGES
    # More of the rotation's columns, or the parts of float32, wait in registers too.
    elements = ELEMENTS // 2 if dim_pad > 256 or dtype == torch.float32 else ELEMENTS
    most = max(LEAST, min(elements // dim_pad, triton.next_power_of_2(page)))
    tokens = page if whole else fmt.group if channel else min(most, page)
    fields = {
        field: layout.fields[f"{name}.{field}"]
        for field in ("codes", "scale", "zero", "other")
        if f"{name}.{field}" in layout.fields
    }
    at = [fields[field].offset if field in fields else -1 for field in ("codes", "scale", "zero", "other")]
    ends = (field.offset + field.nbytes for field in fields.values())
    depth = min(dim_pad, _MOST_DEPTH // (4 if dtype == torch.float32 else 1), _MOST_DEPTH * 128 // dim_pad)
    return EncodedSide(
        method=method,
        dim=fmt.dim,
        dim_pad=dim_pad,
        segments=segments_of(fmt.bits) if fmt.level != "dense" else 1,
        page=page,
        tokens=tokens,
        block=max(LEAST, triton.next_power_of_2(tokens)),
        blocks=triton.cdiv(page, tokens),
        bits=fmt.bits,
        channel=channel,
        group=fmt.group,
        codes_at=at[0],
        scale_at=at[1],
        zero_at=at[2],
        other_at=at[3],
        paddings=tuple(end for end in ends if end % ALIGNMENT),
        levels=marked_levels(fmt.table),
        edges=tuple((a + b) / 2 for a, b in itertools.pairwise(fmt.table[len(fmt.table) // 2 :])),
        element=None if fmt.dense_dtype is None else TRITON_TYPES[fmt.dense_dtype],
        rotated=fmt.level != "dense" and fmt.rotation != "none",
        centered=fmt.level != "dense" and fmt.centered,
        depth=max(LEAST, depth),
        operand=TRITON_TYPES[operand_of(dtype, arch)],
    )


def operand_of(dtype: torch.dtype, arch: str) -> torch.dtype:
    """The type in which vectors of a dtype are multiplied with the signs of a rotation, which are exact in all.

    The interpreter multiplies no bfloat16. Vectors in float32 become sums of three in bfloat16, which has their range.
    """
    return torch.float32 if arch == "cpu" else torch.float16 if dtype == torch.float16 else torch.bfloat16


def marked_levels(table: tuple[float, ...]) -> tuple[float, ...]:
    """The positive levels of a table that is symmetric about 0, each with its code as the last bits of its float32.

    That changes a level by 2e-6 of itself at most, half precision's rounding of scales by 5e-4. A kernel then carries
    levels alone, for codes and numbers in registers of their own do not fit.
    """
    positive = np.array(table[len(table) // 2 :], dtype=np.float32)
    codes = np.arange(len(positive), 2 * len(positive), dtype=np.uint32)
    mask = np.uint32(max(len(table) - 1, 0))
    return tuple(((positive.view(np.uint32) & ~mask) | codes).view(np.float32).tolist())


def segments_of(bits: int) -> int:
    """Segments into which the places interleave a row of codes."""
    return 8 if bits == 3 else 8 // bit_planes(bits)[0]


@lru_cache(maxsize=32)
def rotation_by_places(
    dim: int, dim_pad: int, bits: int, kind: Rotation, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """A rotation as signs, and the factor of each place.

    Args:
        dim: width of a vector.
        dim_pad: number of places.
        bits: bits of a code.
        kind: the rotation.
        dtype: of the signs.
        device: where the result is to be.

    Returns:
        ``[places, channels]``, padded, of -1, 0 and 1 in ``dtype``, and fp32 ``[dim_pad]``; 0 where no channel is.
    """
    # A cached tensor made under inference_mode could not be used outside it.
    with torch.inference_mode(False):
        matrix = rotation_matrix(dim, kind, torch.float64, torch.device("cpu"))
        assert matrix is not None
        place = torch.arange(dim_pad, device="cpu")
        segments = segments_of(bits)
        segment = place % segments
        segment = 2 * (segment % 4) + segment // 4 if bits == 3 else segment
        there = place // segments < dim // segments
        channel = (segment * (dim // segments) + place // segments)[there]
        signs = torch.zeros(dim_pad, dim_pad, dtype=dtype, device="cpu")
        signs[there, :dim] = matrix.T[channel].sign().to(dtype)
        factors = torch.zeros(dim_pad, dtype=torch.float32, device="cpu")
        factors[there] = matrix[:, channel].abs().amax(0).float()
        return signs.to(device), factors.to(device)


@triton.jit
def places(side: tl.constexpr):
    """The channel at each place, and whether there is one."""
    place = tl.arange(0, side.dim_pad)
    segment, j = place % side.segments, place // side.segments
    if side.bits == 3:
        segment = 2 * (segment % 4) + segment // 4
    return segment * side.segment + j, j < side.segment


@triton.jit
def load_rotated(source, stride, token, real, signs, factors, key_mean, key_scale, side: tl.constexpr):
    """fp32 ``[block, dim_pad]``: the vectors of some tokens, rotated and less the key mean, by places; 0 elsewhere.

    Args:
        source: pointer to the first vector of the page.
        stride: elements from a token to the next.
        token: int32 ``[block]``, numbers of the tokens in the page.
        real: bool ``[block]``, which of them exist.
        signs: the rotation from :func:`rotation_by_places`, or anything if there is none.
        factors: its factors.
        key_mean: pointer to the rotated mean, fp32 ``[dim]``, or anything if there is none.
        key_scale: pointer to the scale of the channels, fp32 ``[dim]``, powers of two; None if there is none.
        side: description of the side. If it is ``turned``, the result is ``[dim_pad, block]``.
    """
    channel, there = places(side)
    rows = source + token[:, None] * stride
    if side.rotated:
        place = tl.arange(0, side.dim_pad)
        if side.turned:
            x = tl.full([side.dim_pad, side.block], 0.0, tl.float32)
        else:
            x = tl.full([side.block, side.dim_pad], 0.0, tl.float32)
        steps: tl.constexpr = side.dim_pad // side.depth
        for step in range(steps):
            k = step * side.depth + tl.arange(0, side.depth)
            part = tl.load(rows + k[None, :], mask=real[:, None] & (k < side.dim)[None, :], other=0.0)
            if key_scale is not None:
                # By a power of two: exact, as the scale keeps the quotient in the range of the type.
                inverse = 1.0 / tl.load(key_scale + k, mask=k < side.dim, other=1.0)
                part = (part.to(tl.float32) * inverse[None, :]).to(part.dtype)
            if side.turned:
                columns = tl.load(signs + place[:, None] * side.dim_pad + k[None, :])
            else:
                columns = tl.load(signs + place[None, :] * side.dim_pad + k[:, None])
            x = _add_product(x, part, columns, side)
        x = x * turn(tl.load(factors + place), side)
    else:
        x = tl.load(rows + channel[None, :], mask=real[:, None] & there[None, :], other=0.0).to(tl.float32)
        if key_scale is not None:
            x *= (1.0 / tl.load(key_scale + channel, mask=there, other=1.0))[None, :]
        if side.turned:
            x = tl.trans(x)
    if side.centered:
        x = keep(x - turn(tl.load(key_mean + channel, mask=there, other=0.0), side), real, there, side)
    return x


@triton.jit
def _add_product(x, part, columns, side: tl.constexpr):
    """``x`` and the product of a part of the vectors with their columns of the rotation."""
    if side.operand != tl.float32 and part.dtype == tl.float32:
        # Three numbers of 8 bits, whose sum is the number. The signs are exact, so this is, but for the sums.
        for _ in tl.static_range(3):
            piece = part.to(side.operand)
            part -= piece.to(tl.float32)
            x = _dot(x, piece, columns, side)
        return x
    else:
        return _dot(x, part.to(side.operand), columns, side)


@triton.jit
def _dot(x, part, columns, side: tl.constexpr):
    if side.turned:
        return tl.dot(columns, tl.trans(part), x, input_precision="ieee")
    else:
        return tl.dot(part, columns, x, input_precision="ieee")


@triton.jit
def turn(x, side: tl.constexpr):
    """A number of each place ``[dim_pad]`` as it broadcasts to the tile."""
    if side.turned:
        return x[:, None]
    else:
        return x[None, :]


@triton.jit
def keep(x, real, there, side: tl.constexpr):
    """A tile, 0 where there is no token or no channel."""
    if side.full:
        return x
    elif side.turned:
        return tl.where(real[None, :] & there[:, None], x, 0.0)
    else:
        return tl.where(real[:, None] & there[None, :], x, 0.0)


@triton.jit
def as_scale(x):
    """Numbers in half precision, as scales and zero points are stored."""
    return tl.minimum(tl.maximum(x, -_SCALE_MAX), _SCALE_MAX).to(tl.float16)


@triton.jit
def store_by_token(record, at: tl.constexpr, x, token, real):
    """Store fp16 ``x [block]``, one number for each token."""
    tl.store((record + at).to(tl.pointer_type(tl.float16)) + token, x, mask=real)


@triton.jit
def store_by_channel(record, at: tl.constexpr, x, group, side: tl.constexpr):
    """Store fp16 ``x [dim_pad]``, one number for each place, in the ``group``-th row of a field."""
    channel, there = places(side)
    tl.store((record + at).to(tl.pointer_type(tl.float16)) + group * side.dim + channel, x, mask=there)


@triton.jit
def store_codes(record, code, token, real, side: tl.constexpr):
    """Pack and store codes int32 ``[block, dim_pad]``."""
    bits: tl.constexpr = side.bits
    rows = record + side.codes_at + token[:, None] * (side.dim * bits // 8)
    if bits == 8:
        _store_bytes(rows, code, tl.arange(0, side.dim_pad), side.dim, real)
    elif bits == 3:
        eighth: tl.constexpr = side.dim // 8
        low = _fold(_fold(code & 3, 2), 4)
        j = tl.arange(0, side.dim_pad // 4)
        keep_low = real[:, None] & (j // 2 < eighth)[None, :]
        tl.store(rows + (j % 2 * eighth + j // 2)[None, :], low.to(tl.uint8), mask=keep_low)
        high = _fold(_fold(_fold(code >> 2, 2), 4), 1)
        _store_bytes(rows + 2 * eighth, high, tl.arange(0, side.dim_pad // 8), eighth, real)
    else:
        byte = code
        if bits == 1:
            byte = _fold(byte, 1)
        if bits <= 2:
            byte = _fold(byte, 2)
        byte = _fold(byte, 4)
        _store_bytes(rows, byte, tl.arange(0, side.dim_pad * bits // 8), side.segment, real)


@triton.jit
def _fold(code, shift: tl.constexpr):
    """Int32 ``[block, n / 2]``: of every two neighbors, the first and the second one ``shift`` bits higher."""
    first, second = tl.split(tl.reshape(code, [code.shape[0], code.shape[1] // 2, 2]))
    return first | (second << shift)


@triton.jit
def _store_bytes(rows, byte, j, count: tl.constexpr, real):
    """Store the first ``count`` bytes of each row."""
    tl.store(rows + j[None, :], byte.to(tl.uint8), mask=real[:, None] & (j < count)[None, :])


@triton.jit
def store_padding(record, side: tl.constexpr):
    """Store zeros behind the fields that do not end where the next one begins: records are the same every time."""
    byte = tl.arange(0, 16)
    for i in tl.static_range(len(side.paddings)):
        # Without a name: there may be several paddings, and a constant cannot be assigned to twice.
        tl.store(record + side.paddings[i] + byte, tl.zeros([16], tl.uint8), mask=byte < 16 - side.paddings[i] % 16)
