"""Bit packing, page decoding, and encoding of asymmetric integers in one launch, by Triton kernels.

The codecs of asymmetric integers without a second scale (``int``, ``rotated``) round in a kernel. All others round in
torch, and a kernel packs their bits.

A row is read in eighths of ``D / 8`` elements. A plane of ``w`` bits has ``w`` eighths of bytes, and the bytes of its
eighth ``r`` hold the elements of the eighths ``r``, ``r + w``, ``r + 2 w``, ..., the first in the lowest bits. Rows of
8-bit codes, which may have any length, are one part instead of eight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.hadamard import rotate
from hf_kvcache.kernels.page import PageLayout, SideFormat
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.configs import architecture as architecture_of
from hf_kvcache.kernels.triton.configs import lanes
from hf_kvcache.kernels.triton.device import on_their_device
from hf_kvcache.kernels.triton.sides import (
    Side,
    channels,
    describe_side,
    level_tables,
    load_elements,
    load_table,
)

#: Tokens that a program encodes or decodes.
_TOKENS = 32
#: 1.5 * 2**23: adding and subtracting it rounds to the nearest whole number, ties to even, as torch does.
_ROUNDER = tl.constexpr(12582912.0)
_SCALE_MIN = tl.constexpr(2.0**-14)
_SCALE_MAX = tl.constexpr(65504.0)


def _warps(arch: str) -> int:
    """Warps of a program that encodes or decodes: 16 bytes of 4-bit codes of 128 channels for each of 128 threads."""
    return 128 // lanes(arch)


def _packed_rows(arch: str) -> int:
    """Rows that a program packs: of 128 codes, 16 bytes of an eighth for each thread of its one warp."""
    return lanes(arch)


@on_their_device
def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 ``codes [..., D]`` (each below ``2**bits``) into ``[..., D * bits / 8]``; D is a multiple of 8."""
    if bits == 8:
        return codes
    dim = codes.shape[-1]
    rows = codes.reshape(-1, dim)
    packed = codes.new_empty(*codes.shape[:-1], dim * bits // 8)
    if rows.numel():
        block = _packed_rows(architecture_of(codes.device))
        _pack_kernel[(triton.cdiv(len(rows), block),)](
            rows, rows.stride(0), packed, len(rows), DIM=dim, BITS=bits, PAD=_pad(dim // 8), ROWS=block, num_warps=1
        )
    return packed


@on_their_device
def decode_side(layout: PageLayout, side: str, records: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Decode one side of page records into ``out``, in the rotated basis and without the mean.

    Args:
        layout: the layout of the records.
        side: ``"keys"`` or ``"values"``.
        records: uint8 ``[..., record_bytes]``.
        out: float32 ``[..., P, D]``, contiguous, overwritten.

    Returns:
        ``out``, or for dense pages already of its dtype a view of the records.
    """
    fmt = layout.sides[side]
    if fmt.level == "dense":
        codes = layout.view(records, f"{side}.codes")
        assert codes is not None
        return codes if codes.dtype == out.dtype else out.copy_(codes)
    assert out.is_contiguous()
    flat = records.reshape(-1, records.shape[-1])
    described = describe_side(layout, side, tl.float32, fold=False)
    tokens = min(_TOKENS, described.page_pad)
    if len(flat):
        _decode_kernel[len(flat), described.page_pad // tokens](
            flat,
            flat.stride(0),
            level_tables(fmt.table, fmt.table, out.device),
            out,
            SIDE=described,
            TOKENS=tokens,
            num_warps=_warps(architecture_of(out.device)),
        )
    return out


def supports_decoding(layout: PageLayout, records: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether :func:`decode_side` can decode such records."""
    return out.is_contiguous()


def supports_encoding(layout: PageLayout, side: str, method: str | None, x: torch.Tensor) -> bool:
    """Whether :func:`encode_side` can encode such pages."""
    return method == "integer" and can_encode(layout.sides[side])


@on_their_device
def encode_side(
    layout: PageLayout,
    side: str,
    method: str,
    x: torch.Tensor,
    key_mean: torch.Tensor | None,
    records: torch.Tensor,
) -> None:
    """Rotate float32 vectors ``x [N, P, D]``, subtract the mean ``[N, D]``, and encode them into ``records``."""
    x = rotate(x, layout.sides[side])
    encode_asymmetric(layout, side, x if key_mean is None else x - key_mean.unsqueeze(1), records)


def can_encode(fmt: SideFormat) -> bool:
    """Whether :func:`encode_asymmetric` can encode a side: integers, no second scale, whole rows if per token."""
    integers = fmt.level == "integer" and fmt.zero and not fmt.other
    return integers and (fmt.axis == "channel" or fmt.group == fmt.dim)


def encode_asymmetric(layout: PageLayout, side: str, x: torch.Tensor, records: torch.Tensor) -> None:
    """Round pages to asymmetric integers and write codes, scales and zero points into their records, in one launch.

    The bytes are those of :func:`hf_kvcache.codecs.base.asymmetric` on the CPU. (On a GPU torch divides by a number by
    multiplying with its reciprocal, so that there a scale may differ in its last bit.)

    Args:
        layout: the layout of the records.
        side: ``"keys"`` or ``"values"``, of a format that :func:`can_encode`.
        x: float32 ``[N, P, D]``, rotated and without the key mean, as the format says.
        records: uint8 ``[N, record_bytes]``; the side's fields are written.
    """
    fmt = layout.sides[side]
    assert can_encode(fmt) and records.stride(-1) == 1
    if not len(x):
        return
    described = describe_side(layout, side, tl.float32, fold=False)
    tokens = fmt.group if fmt.axis == "channel" else layout.page_size
    block = triton.next_power_of_2(tokens) if fmt.axis == "channel" else min(_TOKENS, described.page_pad)
    _encode_kernel[len(x), triton.cdiv(layout.page_size, min(tokens, block))](
        x.contiguous(),
        records,
        records.stride(0),
        **_encode_constants(described, min(tokens, block), block),
        num_warps=_warps(architecture_of(x.device)),
    )


def _encode_constants(side: Side, tokens: int, block: int) -> dict[str, object]:
    parts = 1 if side.bits == 8 else 8
    return {"SIDE": side, "PARTS": parts, "PAD": _pad(side.dim // parts), "TOKENS": tokens, "BLOCK": block}


def _pad(size: int) -> int:
    return int(triton.next_power_of_2(size))


@triton.jit(do_not_specialize=["rows"])
def _pack_kernel(
    codes, stride, packed, rows, DIM: tl.constexpr, BITS: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr
):
    """Pack codes uint8 ``[rows, DIM]``, rows ``stride`` apart, into ``packed [rows, DIM * BITS / 8]``."""
    EIGHTH: tl.constexpr = DIM // 8
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = tl.arange(0, PAD)
    mask = (row < rows)[:, None] & (j < EIGHTH)[None, :]
    source, target = codes + row[:, None] * stride, packed + row[:, None] * (DIM * BITS // 8)
    if BITS == 3:
        _pack_plane(source, target, j, mask, 0, 2, EIGHTH)
        _pack_plane(source, target + DIM // 4, j, mask, 2, 1, EIGHTH)
    else:
        _pack_plane(source, target, j, mask, 0, BITS, EIGHTH)


@triton.jit
def _pack_plane(source, target, j, mask, shift: tl.constexpr, width: tl.constexpr, EIGHTH: tl.constexpr):
    """Pack bits ``shift ... shift + width`` of the codes of rows at ``source [ROWS, 1]`` into rows at ``target``."""
    for r in tl.static_range(width):
        byte = tl.zeros(mask.shape, tl.uint8)
        for s in tl.static_range(8 // width):
            code = tl.load(source + ((s * width + r) * EIGHTH + j)[None, :], mask=mask, other=0)
            byte = byte | (((code >> shift) & ((1 << width) - 1)) << (s * width))
        tl.store(target + (r * EIGHTH + j)[None, :], byte, mask=mask)


@triton.jit
def _decode_kernel(records, stride, tables, out, SIDE: tl.constexpr, TOKENS: tl.constexpr):
    """Decode ``TOKENS`` tokens of a page into ``out [N, P, D]``; grid (pages, token blocks)."""
    page = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * TOKENS
    channel, there = channels(SIDE)
    table = load_table(tables, SIDE)
    held = tl.full([], SIDE.page, tl.int32) - first
    x = load_elements(records + page * stride, first, held, table, channel, there, SIDE, TOKENS, True)
    token = first + tl.arange(0, TOKENS)
    mask = (token < SIDE.page)[:, None] & there[None, :]
    tl.store(out + (page * SIDE.page + token)[:, None] * SIDE.dim + channel[None, :], x, mask=mask)


@triton.jit
def _scale_and_zero(low, high, SIDE: tl.constexpr):
    """The scale and the zero point, in half precision, of numbers between ``low`` and ``high``."""
    zero = tl.minimum(tl.maximum(low, -_SCALE_MAX), _SCALE_MAX).to(tl.float16)
    most: tl.constexpr = (1 << SIDE.bits) - 1
    steps = tl.full(high.shape, most, tl.float32)
    scale = tl.maximum(tl.div_rn(high - zero.to(tl.float32), steps), _SCALE_MIN)
    return tl.minimum(scale, _SCALE_MAX).to(tl.float16), zero


@triton.jit
def _round(x, scale, zero, SIDE: tl.constexpr):
    """The codes uint8 of numbers."""
    most: tl.constexpr = (1 << SIDE.bits) - 1
    steps = tl.div_rn(x - zero.to(tl.float32), scale.to(tl.float32) + tl.zeros_like(x))
    steps = tl.minimum(tl.maximum(steps, 0.0), most * 1.0)
    return ((steps + _ROUNDER) - _ROUNDER).to(tl.uint8)


@triton.jit
def _encode_kernel(
    x,
    records,
    stride,
    SIDE: tl.constexpr,
    PARTS: tl.constexpr,
    PAD: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Encode ``TOKENS`` tokens of a page, a group of them if scales are per channel; grid (pages, groups).

    Args:
        x: fp32 ``[N, P, D]``.
        records: uint8, records ``stride`` bytes apart; the side's fields are written.
        PARTS: parts of a row that are handled one by one.
        PAD: elements of a part, rounded up to a power of two.
        BLOCK: ``TOKENS`` rounded up to a power of two.
    """
    PART: tl.constexpr = SIDE.dim // PARTS
    page, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    source = x + page * SIDE.page * SIDE.dim
    record = records + page * stride
    scales = (record + SIDE.scale_at).to(tl.pointer_type(tl.float16))
    zeros = (record + SIDE.zero_at).to(tl.pointer_type(tl.float16))
    i, j = tl.arange(0, BLOCK), tl.arange(0, PAD)
    token = group * TOKENS + i
    real, inside = (i < TOKENS) & (token < SIDE.page), j < PART
    mask = real[:, None] & inside[None, :]
    row_scale, row_zero = tl.zeros([BLOCK], tl.float16), tl.zeros([BLOCK], tl.float16)
    if not SIDE.channel:
        low, high = tl.full([BLOCK], float("inf"), tl.float32), tl.full([BLOCK], float("-inf"), tl.float32)
        for part in tl.static_range(PARTS):
            at = token[:, None] * SIDE.dim + (part * PART + j)[None, :]
            low = tl.minimum(low, tl.min(tl.load(source + at, mask=mask, other=float("inf")), 1))
            high = tl.maximum(high, tl.max(tl.load(source + at, mask=mask, other=float("-inf")), 1))
        row_scale, row_zero = _scale_and_zero(tl.where(real, low, 0.0), tl.where(real, high, 0.0), SIDE)
        tl.store(scales + token, row_scale, mask=real)
        tl.store(zeros + token, row_zero, mask=real)
    rows = source + token[:, None] * SIDE.dim
    target = record + SIDE.codes_at + token[:, None] * (SIDE.dim * SIDE.bits // 8)
    cells = group * SIDE.dim + j
    if PARTS == 1:
        _encode_plane(rows, target, scales, zeros, cells, row_scale, row_zero, j, mask, 0, 1, 8, PARTS, SIDE)
    elif SIDE.bits == 3:
        _encode_plane(rows, target, scales, zeros, cells, row_scale, row_zero, j, mask, 0, 2, 2, PARTS, SIDE)
        high = target + SIDE.dim // 4
        _encode_plane(rows, high, scales, zeros, cells, row_scale, row_zero, j, mask, 2, 1, 1, PARTS, SIDE)
    else:
        width: tl.constexpr = SIDE.bits
        _encode_plane(rows, target, scales, zeros, cells, row_scale, row_zero, j, mask, 0, width, width, PARTS, SIDE)


@triton.jit
def _encode_plane(
    rows,
    target,
    scales,
    zeros,
    cells,
    row_scale,
    row_zero,
    j,
    mask,
    shift: tl.constexpr,
    turns: tl.constexpr,
    width: tl.constexpr,
    PARTS: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Encode bits ``shift ... shift + width`` of the codes of rows at ``rows [BLOCK, 1]`` into rows at ``target``.

    Scales per channel are found, and written with the first plane, here; those per token are given.
    """
    PART: tl.constexpr = SIDE.dim // PARTS
    for r in tl.static_range(turns):
        byte = tl.zeros(mask.shape, tl.uint8)
        for s in tl.static_range(PARTS // turns):
            x = tl.load(rows + ((s * turns + r) * PART + j)[None, :], mask=mask, other=0.0)
            if SIDE.channel:
                low = tl.min(tl.where(mask, x, float("inf")), 0)
                high = tl.max(tl.where(mask, x, float("-inf")), 0)
                scale, zero = _scale_and_zero(tl.where(j < PART, low, 0.0), tl.where(j < PART, high, 0.0), SIDE)
                if shift == 0:
                    tl.store(scales + cells + (s * turns + r) * PART, scale, mask=j < PART)
                    tl.store(zeros + cells + (s * turns + r) * PART, zero, mask=j < PART)
                code = _round(x, scale[None, :], zero[None, :], SIDE)
            else:
                code = _round(x, row_scale[:, None], row_zero[:, None], SIDE)
            byte = byte | (((code >> shift) & ((1 << width) - 1)) << (s * width))
        tl.store(target + (r * PART + j)[None, :], byte, mask=mask)


def compile_cases(architecture: str) -> list[CompileCase]:
    """Specialisations for the compile report."""
    page, dim = 64, 128
    formats = {
        "per channel": SideFormat(dim, 4, axis="channel", group=page),
        "per token": SideFormat(dim, 4, axis="token", group=dim),
    }
    cases = []
    for name, fmt in formats.items():
        side = describe_side(PageLayout(fmt, fmt, page), "keys", tl.float32, fold=False)
        tokens = page if side.channel else _TOKENS
        cases.append(
            CompileCase(
                name=f"encode 4-bit integers {name} D={dim}",
                kernel=_encode_kernel,
                signature={"x": "*fp32", "records": "*u8", "stride": "i32"},
                constants=_encode_constants(side, tokens, tokens),
                num_warps=_warps(architecture),
                num_stages=1,
                aligned=("x", "records", "stride"),
            )
        )
        cases.append(
            CompileCase(
                name=f"decode_side 4-bit integers {name} D={dim}",
                kernel=_decode_kernel,
                signature={"records": "*u8", "stride": "i32", "tables": "*fp32", "out": "*fp32"},
                constants={"SIDE": side, "TOKENS": _TOKENS},
                num_warps=_warps(architecture),
                num_stages=1,
                aligned=("records", "stride", "tables", "out"),
            )
        )
    for bits in (2, 3, 4):
        cases.append(
            CompileCase(
                name=f"pack_bits {bits} D={dim}",
                kernel=_pack_kernel,
                signature={"codes": "*u8", "stride": "i32", "packed": "*u8", "rows": "i32"},
                constants={"DIM": dim, "BITS": bits, "PAD": dim // 8, "ROWS": _packed_rows(architecture)},
                num_warps=1,
                num_stages=1,
                aligned=("codes", "stride", "packed"),
            )
        )
    return cases
