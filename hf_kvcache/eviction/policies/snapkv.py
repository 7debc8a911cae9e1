"""SnapKV: what the last queries of the prompt attend to (arXiv:2404.14469)."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.attended import before_queries, mean_attention, pool_mean
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.registry import register
from hf_kvcache.eviction.window import WindowPolicy
from hf_kvcache.utils.validation import odd, whole


@register("snapkv")
class SnapKV(WindowPolicy):
    """Attention of an observation window, averaged over its queries and heads and pooled over neighboring tokens.

    The window's own tokens stay, and are no neighbors of those before it. It takes a quarter of the budget at most, and
    is shorter where ``window`` is more.

    Args:
        window: latest queries that are observed, and whose tokens stay; no more than a quarter of what a head keeps.
        kernel: tokens of the average pool, odd; at the ends, only those that exist count.

    Raises:
        ValueError: if ``window`` is below 1 or ``kernel`` is not odd.
    """

    def __init__(self, window: int = 64, kernel: int = 5) -> None:
        self.window, self.kernel = whole("window", window), odd("kernel", kernel)

    def score(self, ctx: Context) -> torch.Tensor:
        ctx = self.windowed(ctx)
        return pool_mean(mean_attention(ctx).mean(2), before_queries(ctx), self.kernel)
