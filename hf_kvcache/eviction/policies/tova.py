"""TOVA: what the last query attends to (arXiv:2401.06104)."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.registry import register
from hf_kvcache.utils.validation import flag


@register("tova")
class TOVA(Policy):
    """Attention of the last query, averaged over all heads of the layer, which so keep the same tokens.

    Args:
        per_head: average over the query heads of each KV head only.

    Raises:
        ValueError: if ``per_head`` is not a bool.
    """

    needs_values = False
    observed = 1

    def __init__(self, per_head: bool = False) -> None:
        self.per_head = flag("per_head", per_head)

    def score(self, ctx: Context) -> torch.Tensor:
        *_, part = ctx.probabilities()
        weights = part[:, :, :, -1].mean(2)
        if self.per_head:
            return weights
        if ctx.held is None and bool((ctx.positions == ctx.positions[:, :1]).all()):
            return weights.mean(1, keepdim=True).expand_as(weights)
        return _mean_by_position(weights, ctx.positions)


def _mean_by_position(weights: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The mean over the heads that hold a token, where they hold different ones: both are ``[B, Hkv, T]``.

    Places without a token meet only each other: their positions are beyond all others.
    """
    distinct, index = positions.unique(return_inverse=True)
    index = index.flatten(1)
    total = weights.new_zeros(len(weights), len(distinct)).scatter_add_(1, index, weights.flatten(1))
    holders = torch.zeros_like(total).scatter_add_(1, index, torch.ones_like(weights).flatten(1))
    return (total / holders.clamp_min(1)).gather(1, index).view_as(weights)
