"""Attention of a long block of new queries (a prefill chunk) over pages and full-precision tokens."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.decode import reference
from hf_kvcache.kernels.dispatch import twin
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.visibility import Visibility

__all__ = ["attend"]


def attend(
    query: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    mass: bool = False,
) -> Attention:
    """What :func:`hf_kvcache.kernels.decode.attend` gives, by the twin that is made for many queries.

    The reference is the same: attention over the full-precision tokens, merged with a pass over the pages in blocks.
    """
    faster = twin("extend", query.device)
    if faster is not None and faster.supports(query, pages, dense, visibility):
        return faster.attend(query, pages, dense, visibility, scoring, mass)
    return reference.attend(query, pages, dense, visibility, scoring, mass)
