"""Rare: a part of each head's budget for keys that are unlike the others, whatever attention they get."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.policies.leverage import Leverage
from hf_kvcache.eviction.registry import register
from hf_kvcache.eviction.selection import highest
from hf_kvcache.eviction.wrapper import Wrapper
from hf_kvcache.utils.validation import between


@register("rare", wraps=True)
class Rare(Wrapper):
    """The first part of what each head may choose by the leverage of its keys, the rest by the policy's score.

    Leverage (see ``"leverage"``) says how little other keys of the head resemble one. It finds what a text says once,
    such as a name or a number, which attention may not show before it is asked for. What is protected uses up quota and
    is no part of the choice. Where heads compete (``ada``, ``across``), each is sure of its first part.

    Args:
        policy: the policy that gives the score for the rest.
        share: of the choice, that is made by leverage.

    Raises:
        ValueError: if ``share`` is outside 0 to 1.
    """

    def __init__(self, policy: Policy, share: float = 0.4) -> None:
        super().__init__(policy)
        self.share = between("share", share, 0, 1)

    @property
    def needs_states(self) -> bool:  # type: ignore[override]
        return True

    @property
    def needs_rope(self) -> bool:  # type: ignore[override]
        return True

    def score(self, ctx: Context) -> torch.Tensor:
        scores = self.policy.score(ctx).float()
        free = (ctx.quota - ctx.protected.sum(-1, keepdim=True)).clamp_min(0)
        candidates = ~ctx.protected if ctx.held is None else ctx.held & ~ctx.protected
        rarity = Leverage().score(ctx).masked_fill(~candidates, -torch.inf)
        chosen = candidates & highest(rarity, (free * self.share).long())
        # Finite, so that there is room above for what is protected.
        return scores.masked_fill(chosen, torch.finfo(scores.dtype).max)
