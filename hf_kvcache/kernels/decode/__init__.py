"""Attention of a few new queries over pages and full-precision tokens."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.decode import reference
from hf_kvcache.kernels.decode.levels import decode_side
from hf_kvcache.kernels.dispatch import twin
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.visibility import Visibility

__all__ = ["attend", "decode_side"]


def attend(
    query: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    mass: bool = False,
) -> Attention:
    """Attention of new queries, by the twin for their device; :func:`reference.attend` tells what it takes and gives.

    A twin says with ``supports`` what it can do; the reference does the rest (masks that say more than causality,
    windows and padding).
    """
    faster = twin("decode", query.device)
    if faster is not None and faster.supports(query, pages, dense, visibility):
        return faster.attend(query, pages, dense, visibility, scoring, mass)
    return reference.attend(query, pages, dense, visibility, scoring, mass)
