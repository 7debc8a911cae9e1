"""The Cholesky factor, without the wait for the device that torch's own check of its result is."""

from __future__ import annotations

import torch


def lower_factor(gram: torch.Tensor) -> torch.Tensor:
    """Lower ``L`` with ``L L' = gram [..., n, n]``; NaN for a matrix that is not positive definite.

    A NaN among the scores counts as the lowest score.
    """
    lower, failed = torch.linalg.cholesky_ex(gram)
    return lower.masked_fill(failed.bool()[..., None, None], torch.nan)
