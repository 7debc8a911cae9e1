"""The Triton kernel that gathers single latents and rotary keys, and its specializations for the compile report."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.page import PageLayout
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.elements import load_elements
from hf_kvcache.kernels.triton.latent_cases import latent_format
from hf_kvcache.kernels.triton.sides import TRITON_TYPES, Side, channels, describe_side, load_table

#: Warps of a program, which copies one token.
WARPS = 1
#: DeepSeek-V2's widths, and the tokens of a page, of the compile report.
_RANK, _ROTARY, _PAGE = 512, 64, 64
_SIZES = ("capacity", "columns", "slots", "count")
_STRIDES = ("latents_b", "latents_n", "rotary_b", "rotary_n")


@triton.jit
def _copy_side(record, token, held, dense, in_slot, table, out, side: tl.constexpr):
    """One side of a token, of a page if ``held`` is 1, of ``dense`` if ``in_slot``, else zeros, to ``out [dim]``."""
    channel, there = channels(side)
    packed = load_elements(record, token, held, table, channel, there, side, 1, True).to(tl.float32)
    some = in_slot.to(tl.int32) + tl.zeros_like(channel) > 0  # the interpreter makes no mask of a scalar and a vector
    full = tl.load(dense + channel, mask=there & some, other=0.0).to(tl.float32)
    x = tl.reshape(packed, [side.dim_pad]) + full
    tl.store(out + channel, x.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["capacity", "columns", "slots", "count"])
def gather_kernel(
    pages,
    tables,
    dense_latents,
    dense_rotary,
    places,
    latents,
    rotary,
    latents_b,
    latents_n,
    rotary_b,
    rotary_n,
    capacity,
    columns,
    slots,
    count,
    LATENTS: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Copy one token, decoded if it lies in a page; grid (tokens of a sequence, sequences).

    Args:
        pages: int64 ``[3, B, capacity]``, of which the addresses of the records are read; 0 where there is no page.
        tables: fp32 ``[2, 16]``, the levels of latents and rotary keys; read where a side has ``level="table"``.
        dense_latents: the full-precision latents ``[B, slots, r]``, with strides ``latents_b`` and ``latents_n``.
        dense_rotary: the full-precision rotary keys ``[B, slots, dr]``, likewise; not read if ``ROTARY`` is None.
        places: int64 ``[B, count]``: a slot, or ``slots + column * P + place`` in a page, or -1 for no token.
        latents: ``[B, count, r]``, written; 0 where there is no token.
        rotary: ``[B, count, dr]``, written likewise; not if ``ROTARY`` is None.
        capacity: the distance between rows of the table.
        columns: columns of pages.
        slots: full-precision tokens of a sequence.
        count: tokens to gather for a sequence.
        LATENTS: the latents of a page.
        ROTARY: its rotary keys; None if they have no width.
    """
    sequence = tl.program_id(1).to(tl.int64)
    to = sequence * count + tl.program_id(0)
    place = tl.load(places + to)
    in_slot = (place >= 0) & (place < slots)
    behind = tl.maximum(place - slots, 0)
    column = behind // LATENTS.page
    in_page = (place >= slots) & (column < columns)
    address = tl.load(pages + sequence * capacity + column, mask=in_page, other=0)
    record = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)
    token = (behind % LATENTS.page).to(tl.int32)
    held = (address != 0).to(tl.int32)
    slot = tl.where(in_slot, place, 0)
    full = dense_latents + sequence * latents_b + slot * latents_n
    _copy_side(record, token, held, full, in_slot, load_table(tables, LATENTS), latents + to * LATENTS.dim, LATENTS)
    if ROTARY is not None:
        full = dense_rotary + sequence * rotary_b + slot * rotary_n
        table = load_table(tables + 16, ROTARY)
        _copy_side(record, token, held, full, in_slot, table, rotary + to * ROTARY.dim, ROTARY)


def gather_sides(layout: PageLayout) -> dict[str, Side | None]:
    """The constants of :func:`gather_kernel`: both sides of a page, None for one without width."""
    return {
        name: describe_side(layout, side, tl.float32, fold=False) if layout.sides[side].dim else None
        for name, side in (("LATENTS", "keys"), ("ROTARY", "values"))
    }


def compile_cases(arch: str) -> list[CompileCase]:
    """Latents of each codec, gathered in bfloat16; 4 bits in float32 too."""
    layouts = {
        codec: PageLayout(latent_format(codec, _RANK), latent_format("bf16", _ROTARY), _PAGE)
        for codec in ("bf16", "int8", "int4")
    }
    cases = [gather_case(f"latent_gather {codec}", layout, torch.bfloat16) for codec, layout in layouts.items()]
    return [*cases, gather_case("latent_gather int4 fp32", layouts["int4"], torch.float32)]


def gather_case(name: str, layout: PageLayout, dtype: torch.dtype) -> CompileCase:
    """:func:`gather_kernel` for tokens of a dtype."""
    element = f"*{TRITON_TYPES[dtype]}"
    pointers: dict[str, Any] = {"pages": "*i64", "tables": "*fp32", "dense_latents": element, "dense_rotary": element}
    pointers |= {"places": "*i64", "latents": element, "rotary": element}
    return CompileCase(
        name=name,
        kernel=gather_kernel,
        signature=pointers | dict.fromkeys((*_STRIDES, *_SIZES), "i32"),
        constants=dict(gather_sides(layout)),
        num_warps=WARPS,
        num_stages=1,
        aligned=(*pointers, *_STRIDES),
    )
