"""CriticalKV: how much a token can change the layer's output, not only its attention (arXiv:2502.03805)."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.registry import register
from hf_kvcache.eviction.selection import highest
from hf_kvcache.eviction.wrapper import Wrapper
from hf_kvcache.utils.validation import between

#: Output elements computed at a time.
_BLOCK_ELEMENTS = 1 << 22


@register("critical", wraps=True)
class Critical(Wrapper):
    """The first part of what each head may choose by the score alone, the rest by score times the length of the output.

    The length is the L1 norm of ``W_O v``, averaged over the query heads of the group. What is protected uses up quota
    and is no part of the choice. With ``ada``, before or behind it, each head is sure of its first part.

    Args:
        policy: the policy that gives the score, meant to be attention; scores below zero are first shifted up to it,
            head by head, since a product with them would put long outputs last.
        first: share of the choice that is made by the score alone.
        epsilon: added to the score before it is multiplied, so that a token without attention has a rank too.

    Raises:
        ValueError: if ``first`` is outside 0 to 1 or ``epsilon`` negative.
    """

    def __init__(self, policy: Policy, first: float = 0.5, epsilon: float = 1e-4) -> None:
        super().__init__(policy)
        self.first = between("first", first, 0, 1)
        self.epsilon = between("epsilon", epsilon, 0, float("inf"))

    @property
    def needs_output(self) -> bool:  # type: ignore[override]
        return True

    @property
    def needs_states(self) -> bool:  # type: ignore[override]
        return True

    @property
    def needs_values(self) -> bool:  # type: ignore[override]
        return True

    def score(self, ctx: Context) -> torch.Tensor:
        scores = self.policy.score(ctx).float()
        absent = torch.zeros_like(ctx.protected) if ctx.held is None else ~ctx.held
        free = (ctx.quota - ctx.protected.sum(-1, keepdim=True)).clamp_min(0)
        candidates = ~ctx.protected & ~absent
        chosen = candidates & highest(scores.masked_fill(~candidates, -torch.inf), (free * self.first).long())
        lowest = scores.masked_fill(absent, 0.0).amin(-1, keepdim=True).clamp_max(0.0)
        weighted = (scores - lowest + self.epsilon) * output_lengths(ctx)
        # Finite, so that there is room above for what is protected.
        return weighted.masked_fill(chosen, torch.finfo(weighted.dtype).max)


def output_lengths(ctx: Context) -> torch.Tensor:
    """L1 norm of each value behind the output projection, averaged over a group's heads, float32 ``[B, Hkv, T]``."""
    assert ctx.output_weight is not None
    batch, heads, tokens, dim = ctx.values.shape
    weight = ctx.output_weight.float().unflatten(1, (heads, -1, dim)).permute(2, 1, 3, 0)
    total = torch.zeros(batch, heads, tokens, dtype=torch.float32, device=ctx.values.device)
    step = max(1, _BLOCK_ELEMENTS // (batch * heads * weight.shape[-1]))
    for part in (slice(start, start + step) for start in range(0, tokens, step)):
        for of_head in weight:
            total[:, :, part] += (ctx.values[:, :, part].float() @ of_head).abs_().sum(-1)
    return total / len(weight)
