"""From scores to the tokens that stay."""

from __future__ import annotations

import torch


def choose(
    scores: torch.Tensor,
    protected: torch.Tensor,
    held: torch.Tensor | None,
    quota: int,
    head_floor: float | None = None,
    above: float | None = None,
) -> torch.Tensor:
    """The tokens that stay: the protected ones, and of the others those with the highest scores.

    Args:
        scores: ``[B, Hkv, T]``; of equal ones the newer token goes first. NaN counts as the lowest score.
        protected: bool ``[B, Hkv, T]``, tokens that stay in any case.
        held: bool ``[B, Hkv, T]``, False where there is no token; None if there is one everywhere.
        quota: tokens that a head keeps, protected ones included.
        head_floor: None: each head keeps ``quota``. A share: the heads of a layer compete for ``Hkv * quota`` tokens,
            and each keeps at least this share of ``quota`` (Ada-KV, arXiv:2407.11550).
        above: None, or the score above which a token must be to stay, if it is not protected.

    Returns:
        bool ``[B, Hkv, T]``. More than ``quota`` only where more tokens are protected.
    """
    limit = torch.finfo(torch.float32).max
    scores = scores.float().nan_to_num(nan=-limit).clamp(-limit, limit)
    if above is not None:
        scores = scores.masked_fill(scores <= above, -torch.inf)
    scores = scores.masked_fill(protected, torch.inf)
    if held is not None:
        scores = scores.masked_fill(~held, -torch.inf)
    if head_floor is not None:
        safe = highest(scores, int(quota * head_floor)) & (scores > -torch.inf)
        scores = scores.masked_fill(safe, torch.inf)
        # Token by token, so that of equal scores the newer one goes first whichever head it is of.
        by_token = scores.transpose(1, 2)
        kept = safe | highest(by_token.flatten(1), quota * scores.shape[1]).view(by_token.shape).transpose(1, 2)
    else:
        kept = highest(scores, quota)
    return (kept | protected) & (scores > -torch.inf)


def highest(scores: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Where the ``count`` highest of ``scores [..., T]`` stand; of equal ones the last.

    Args:
        scores: without NaN.
        count: a number for all rows, or one for each, ``[..., 1]``.
    """
    order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    return order.argsort(-1).flip(-1) < count
