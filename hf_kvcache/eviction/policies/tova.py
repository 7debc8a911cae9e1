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
        if ctx.aligned:
            return weights.mean(1, keepdim=True).expand_as(weights)
        return _mean_by_position(weights, ctx.positions)


def _mean_by_position(weights: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The mean over the heads that hold a token, where they hold different ones: both are ``[B, Hkv, T]``.

    Places without a token meet only each other: their positions are beyond all others.
    """
    ordered, order = positions.flatten(1).sort(dim=1, stable=True)
    new = torch.nn.functional.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0))
    # The number of each token's position among the different ones. How many these are, nobody has to know.
    index = torch.zeros_like(order).scatter_(1, order, new.cumsum(1))
    total = torch.zeros_like(weights).flatten(1).scatter_add_(1, index, weights.flatten(1))
    holders = torch.zeros_like(total).scatter_add_(1, index, torch.ones_like(weights).flatten(1))
    return (total / holders.clamp_min(1)).gather(1, index).view_as(weights)
