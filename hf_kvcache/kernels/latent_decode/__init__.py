"""Absorbed multi-head latent attention of a few queries (DeepSeek-V2, arXiv:2405.04434)."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.dispatch import twin
from hf_kvcache.kernels.latent_decode import reference
from hf_kvcache.kernels.visibility import Visibility

__all__ = ["latent_decode"]


def latent_decode(
    query: torch.Tensor,
    latents: torch.Tensor,
    rotary_keys: torch.Tensor,
    scaling: float,
    visibility: Visibility | None = None,
    positions: torch.Tensor | None = None,
    unused: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over latents, by the twin for their device; :func:`reference.latent_decode` tells what it takes."""
    faster = twin("latent_decode", query.device)
    if faster is not None and faster.supports(query, latents, rotary_keys, visibility, positions):
        return faster.latent_decode(query, latents, rotary_keys, scaling, visibility, positions, unused)
    return reference.latent_decode(query, latents, rotary_keys, scaling, visibility, positions, unused)
