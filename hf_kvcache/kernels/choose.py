"""The choice of pages that a decode step reads, by the backend of their device."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.reference import choose as reference
from hf_kvcache.kernels.reference.choose import NO_COLUMN, best_columns

__all__ = ["NO_COLUMN", "best_columns", "choose"]


def choose(
    query: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    spans: int,
    length: int,
    count: int,
    limits: torch.Tensor | None,
    missing: torch.Tensor | None,
) -> torch.Tensor:
    """As :func:`hf_kvcache.kernels.reference.choose.choose`, which says what the arguments are."""
    faster = implementation("choose", query.device)
    if faster is not None and faster.supports(query, codes, scales, length):
        return faster.choose(query, codes, scales, spans, count, limits, missing)
    return reference.choose(query, codes, scales, spans, length, count, limits, missing)
