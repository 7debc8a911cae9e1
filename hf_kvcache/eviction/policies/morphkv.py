"""MorphKV: what the recent tokens attend to, at constant size while decoding (arXiv:2503.00979)."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.registry import register
from hf_kvcache.eviction.window import WindowPolicy
from hf_kvcache.utils.validation import one_of, whole


@register("morphkv")
class MorphKV(WindowPolicy):
    """Attention of a recent window's queries, fused over them, averaged over the heads of a group; the window stays.

    Args:
        window: latest queries that are observed, and whose tokens stay; no more than a quarter of what a head keeps.
        fuse: ``"sum"`` for what most of them attend to, ``"max"`` for what any does.

    Raises:
        ValueError: if ``window`` is below 1 or ``fuse`` is neither.
    """

    def __init__(self, window: int = 32, fuse: str = "sum") -> None:
        self.window, self.fuse = whole("window", window), one_of("fuse", fuse, ("sum", "max"))

    def score(self, ctx: Context) -> torch.Tensor:
        ctx = self.windowed(ctx)
        batch, heads, tokens, _ = ctx.keys.shape
        fused = torch.zeros(batch, heads, ctx.groups, tokens, dtype=torch.float32, device=ctx.keys.device)
        for part in ctx.probabilities():
            fused = fused + part.sum(3) if self.fuse == "sum" else torch.maximum(fused, part.amax(3))
        return fused.mean(2)
