"""Attention over what a layer holds: few queries are a matter of reading memory, many a matter of arithmetic."""

from __future__ import annotations

import torch

from hf_kvcache.kernels import decode, extend
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.visibility import Visibility

#: Query tokens up to which :mod:`decode` is used: one, a draft to verify, a small chunk.
MOST_DECODED_QUERIES = 16


def attend(
    query: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    mass: bool = False,
) -> Attention:
    """Attention of new queries; :func:`hf_kvcache.kernels.decode.reference.attend` tells what it takes and gives."""
    op = decode if query.shape[2] <= MOST_DECODED_QUERIES else extend
    return op.attend(query, pages, dense, visibility, scoring, mass)
