"""Gathering of single latents and rotary keys from pages and full-precision tokens by one Triton launch."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.hadamard import rotate
from hf_kvcache.kernels.inputs import DenseTokens, Pages
from hf_kvcache.kernels.page import SideFormat
from hf_kvcache.kernels.triton.device import on_their_device
from hf_kvcache.kernels.triton.latent_gather_kernels import WARPS, compile_cases, gather_kernel, gather_sides
from hf_kvcache.kernels.triton.sides import TRITON_TYPES, level_tables
from hf_kvcache.kernels.workspace import scratch

__all__ = ["compile_cases", "gather_latents", "supports"]


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


@on_their_device
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
        **gather_sides(layout),
        num_warps=WARPS,
    )
    return latents, rotary


def _in_basis(x: torch.Tensor, fmt: SideFormat) -> torch.Tensor:
    """Full-precision tokens in the basis of the pages, of their own dtype."""
    return x if fmt.rotation == "none" or not x.numel() else rotate(x.float(), fmt).to(x.dtype)
