"""The scale of keys, by the backend of their device."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.reference import key_scale as reference
from hf_kvcache.kernels.reference.key_scale import LEAST_TOKENS

__all__ = ["LEAST_TOKENS", "key_scale"]


def key_scale(query: torch.Tensor, keys: torch.Tensor, first: int, counted: torch.Tensor | None) -> torch.Tensor:
    """See :func:`hf_kvcache.kernels.reference.key_scale.key_scale`."""
    faster = implementation("key_scale", keys.device)
    if faster is not None and faster.supports(query, keys, first, counted):
        return faster.key_scale(query, keys, first, counted)
    return reference.key_scale(query, keys, first, counted)
