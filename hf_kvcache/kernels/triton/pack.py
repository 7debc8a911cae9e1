"""Bit packing and page decoding by Triton kernels.

:mod:`~hf_kvcache.kernels.triton.encode` rounds and packs in one launch. Codes rounded in torch are packed here.

A row is read in eighths of ``D / 8`` elements. A plane of ``w`` bits has ``w`` eighths of bytes, and the bytes of its
eighth ``r`` hold the elements of the eighths ``r``, ``r + w``, ``r + 2 w``, ..., the first in the lowest bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.page import PageLayout, SideFormat
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.configs import architecture as architecture_of
from hf_kvcache.kernels.triton.configs import lanes
from hf_kvcache.kernels.triton.device import on_their_device
from hf_kvcache.kernels.triton.elements import load_elements
from hf_kvcache.kernels.triton.sides import (
    channels,
    describe_side,
    level_tables,
    load_table,
)

#: Tokens that a program decodes.
_TOKENS = 32


def _warps(arch: str) -> int:
    """Warps of a program that decodes: 16 bytes of 4-bit codes of 128 channels for each of 128 threads."""
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
