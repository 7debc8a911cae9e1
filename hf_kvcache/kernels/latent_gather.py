"""Gathering of single latents from pages and full-precision tokens, by the backend of their device."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.inputs import DenseTokens, Pages
from hf_kvcache.kernels.reference import latent_gather as reference

__all__ = ["gather_latents"]


def gather_latents(pages: Pages | None, dense: DenseTokens, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and rotary keys of tokens; see :func:`hf_kvcache.kernels.reference.latent_gather.gather_latents`."""
    faster = implementation("latent_gather", places.device)
    if faster is not None and faster.supports(pages, dense):
        return faster.gather_latents(pages, dense, places)
    return reference.gather_latents(pages, dense, places)
