"""DropKV: how far the output of recent queries moves when a token is left out (arXiv:2605.08840)."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.registry import register
from hf_kvcache.eviction.window import WindowPolicy
from hf_kvcache.utils.validation import whole


@register("dropkv")
class DropKV(WindowPolicy):
    """``(p / (1 - p))^2 * ||v - o||^2``, averaged over the queries of a window and the query heads of a group.

    ``p`` is the probability that a query gives the token, ``v`` the token's value and ``o`` the query's output over all
    tokens. Without the token the other probabilities grow by ``1 / (1 - p)``, so the output moves by
    ``p / (1 - p) * (o - v)``: the score is the exact squared distance. It is in units of the values, so that heads
    can be compared (``"ada-dropkv"``). The window's own tokens stay.

    Args:
        window: latest queries that are observed, and whose tokens stay; no more than a quarter of what a head keeps.

    Raises:
        ValueError: if ``window`` is below 1.
    """

    needs_values = True

    def __init__(self, window: int = 64) -> None:
        self.window = whole("window", window)

    def score(self, ctx: Context) -> torch.Tensor:
        ctx = self.windowed(ctx)
        total = torch.zeros(ctx.keys.shape[:3], dtype=torch.float64, device=ctx.keys.device)
        values = ctx.values.double()[:, :, None]
        lengths = values.square().sum(-1)[..., None, :]
        for part in ctx.probabilities():
            weights = part.double()
            # A query's largest probability stands apart. Where it is near 1, so small differences decide how far the
            # output moves that they are summed up from the other probabilities; the value itself is near the output.
            largest, place = weights.max(-1, keepdim=True)
            others = weights.scatter(-1, place, 0.0)
            left = others.sum(-1, keepdim=True)
            if ctx.scoring.sink_logits is not None:
                left = left + (1 - left - largest).clamp_min(0)
            without = others @ values
            index = place.expand(*place.shape[:-1], values.shape[-1])
            value = values.expand(-1, -1, place.shape[2], -1, -1).gather(3, index)
            outputs = without + largest * value
            distances = lengths - 2 * outputs @ values.mT + outputs.square().sum(-1, keepdim=True)
            total += ((others / (1 - others)).square() * distances.clamp_min(0)).sum((2, 3))
            # Of a query that sees one token alone, nothing is left.
            moved = value - without / left.clamp_min(torch.finfo(left.dtype).tiny)
            moved = largest.square() * moved.square().sum(-1, keepdim=True)
            total.scatter_add_(-1, place.flatten(2), moved.flatten(2))
        queries = 1 if ctx.queries is None else max(ctx.queries.shape[2], 1) * ctx.groups
        return (total / queries).float()
