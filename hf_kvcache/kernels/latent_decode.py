"""Absorbed multi-head latent attention (arXiv:2405.04434) and its projections, by the backend of their device."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.pack import decode_side
from hf_kvcache.kernels.reference import latent_decode as reference
from hf_kvcache.kernels.visibility import Visibility

__all__ = ["absorb", "expand", "latent_attend"]


def latent_attend(
    query: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    sums: bool = False,
) -> Attention:
    """Attention over latents; see :func:`hf_kvcache.kernels.reference.latent_decode.latent_attend`."""
    faster = implementation("latent_decode", query.device)
    if faster is not None and faster.supports(query, pages, dense, visibility, scoring, sums):
        return faster.latent_attend(query, pages, dense, visibility, scoring, sums)
    return reference.latent_attend(query, pages, dense, visibility, scoring, sums, decode_side)


def absorb(query: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Queries ``[B, H, q, dn]`` in latent space, ``[B, H, q, r]``, by the key up-projection ``weight [H, dn, r]``."""
    faster = implementation("latent_decode", query.device)
    if faster is not None and faster.supports_projection(query, weight):
        return faster.absorb(query, weight)
    return reference.absorb(query, weight)


def expand(latents: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted latents ``[B, q, H, r]`` as outputs ``[B, q, H, dv]``, by the value up-projection ``[H, dv, r]``."""
    faster = implementation("latent_decode", latents.device)
    if faster is not None and faster.supports_projection(latents, weight):
        return faster.expand(latents, weight)
    return reference.expand(latents, weight)
