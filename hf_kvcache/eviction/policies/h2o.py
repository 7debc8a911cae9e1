"""H2O: heavy hitters, the tokens that got the most attention so far, and recent ones (arXiv:2306.14048)."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.registry import register
from hf_kvcache.utils.validation import flag


@register("h2o")
class H2O(Policy):
    """Attention summed over all queries so far, and half the budget for the newest tokens.

    Args:
        normalize: divide by the number of queries that could see the token. The paper takes the plain sum, in which
            older tokens have had more chances.

    Raises:
        ValueError: if ``normalize`` is not a bool.
    """

    needs_accumulated = True
    needs_states = False
    needs_values = False

    def __init__(self, normalize: bool = False) -> None:
        self.normalize = flag("normalize", normalize)

    def recent(self, quota: int) -> int:
        return quota // 2

    def score(self, ctx: Context) -> torch.Tensor:
        assert ctx.accumulated is not None
        if not self.normalize:
            return ctx.accumulated
        # A token's own query sees it too. The clamp is for places without a token, whose positions are beyond.
        return ctx.accumulated / (ctx.seen - ctx.positions).clamp_min(1)
