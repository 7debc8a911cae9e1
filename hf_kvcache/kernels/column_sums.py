"""The probability of each key, summed over the queries, by the backend of their device."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.inputs import DenseTokens, Pages, Scoring
from hf_kvcache.kernels.pack import decode_side
from hf_kvcache.kernels.reference import column_sums as reference
from hf_kvcache.kernels.visibility import Visibility

__all__ = ["column_sums"]


def column_sums(
    query: torch.Tensor,
    log_sum_exp: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """See :func:`hf_kvcache.kernels.reference.column_sums.column_sums`."""
    faster = implementation("column_sums", query.device)
    if faster is not None and faster.supports(query, pages, dense, visibility):
        return faster.column_sums(query, log_sum_exp, pages, dense, visibility, scoring)
    return reference.column_sums(query, log_sum_exp, pages, dense, visibility, scoring, decode_side)
