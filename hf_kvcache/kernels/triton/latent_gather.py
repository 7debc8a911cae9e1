"""Gathering of single latents and rotary keys from pages and full-precision tokens by one Triton launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.hadamard import rotate
from hf_kvcache.kernels.inputs import DenseTokens, Pages
from hf_kvcache.kernels.page import PageLayout, SideFormat
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.sides import (
    TRITON_TYPES,
    Side,
    channels,
    describe_side,
    level_tables,
    load_elements,
    load_table,
)
from hf_kvcache.kernels.workspace import scratch

_WARPS = 1
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


def supports(pages: Pages | None, dense: DenseTokens) -> bool:
    """Whether :func:`gather_latents` can gather such tokens. The reference does all others."""
    if pages is None or pages.key_mean is not None:
        return False
    dense_dtypes = [fmt.dense_dtype for fmt in pages.layout.sides.values() if fmt.dense_dtype is not None]
    return (
        all(dtype in TRITON_TYPES for dtype in (*dense_dtypes, dense.keys.dtype, dense.values.dtype))
        and dense.keys.stride(-1) == 1
        and (dense.values.stride(-1) == 1 or dense.values.shape[3] == 0)
    )


def gather_latents(pages: Pages, dense: DenseTokens, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`hf_kvcache.kernels.reference.latent_gather.gather_latents`, for tokens that :func:`supports` accepts.

    Where the codec rotates, all full-precision tokens are rotated first. Their number does not grow with the cache.
    """
    layout, device = pages.layout, places.device
    batch, count = places.shape
    full = [_in_basis(x, layout.sides[side]) for side, x in (("keys", dense.keys), ("values", dense.values))]
    latents, rotary = (
        scratch(f"triton.picked.{name}", (batch, 1, count, x.shape[3]), x.dtype, device)
        for name, x in zip(("latents", "rotary"), full, strict=True)
    )
    table = pages.on_device()
    gather_kernel[count, batch](
        table.table,
        level_tables(layout.sides["keys"].table, layout.sides["values"].table, device),
        *full,
        places.contiguous(),
        latents,
        rotary,
        full[0].stride(0),
        full[0].stride(2),
        full[1].stride(0),
        full[1].stride(2),
        table.capacity,
        pages.columns,
        dense.keys.shape[2],
        count,
        **_sides(layout),
        num_warps=_WARPS,
    )
    return latents, rotary


def _in_basis(x: torch.Tensor, fmt: SideFormat) -> torch.Tensor:
    """Full-precision tokens in the basis of the pages, of their own dtype."""
    return x if fmt.rotation == "none" or not x.numel() else rotate(x.float(), fmt).to(x.dtype)


def _sides(layout: PageLayout) -> dict[str, Side | None]:
    return {
        name: describe_side(layout, side, tl.float32, fold=False) if layout.sides[side].dim else None
        for name, side in (("LATENTS", "keys"), ("ROTARY", "values"))
    }


def gather_case(name: str, layout: PageLayout, dtype: torch.dtype) -> CompileCase:
    """:func:`gather_kernel` for the compile report."""
    element = f"*{TRITON_TYPES[dtype]}"
    pointers: dict[str, Any] = {"pages": "*i64", "tables": "*fp32", "dense_latents": element, "dense_rotary": element}
    pointers |= {"places": "*i64", "latents": element, "rotary": element}
    return CompileCase(
        name=name,
        kernel=gather_kernel,
        signature=pointers | dict.fromkeys((*_STRIDES, *_SIZES), "i32"),
        constants=dict(_sides(layout)),
        num_warps=_WARPS,
        num_stages=1,
        aligned=(*pointers, *_STRIDES),
    )
