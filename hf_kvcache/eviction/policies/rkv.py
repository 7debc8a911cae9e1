"""R-KV: what the latest queries attend to, less what other keys say already (arXiv:2505.24133)."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from hf_kvcache.eviction.attended import before_queries, mean_attention, pool_max
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.registry import register
from hf_kvcache.eviction.window import WindowPolicy
from hf_kvcache.utils.validation import between, odd, whole

#: Similarities computed at a time, so that no matrix of all keys times all keys is ever held.
_BLOCK_ELEMENTS = 1 << 22


@register("rkv")
class RKV(WindowPolicy):
    """``weight * importance - (1 - weight) * redundancy``.

    Importance is the attention of the latest queries: averaged over them, the largest over the heads of a group, and
    the largest over neighboring tokens before the window. Redundancy is the softmax of how similar, on average, the
    keys are to a key. The time it takes grows with the square of the tokens held, its memory does not.

    Args:
        weight: of the importance, the paper's lambda.
        window: latest queries that are observed, and whose tokens stay; no more than a quarter of what a head keeps.
        kernel: tokens of the max pool, odd.
        threshold: cosine above which two keys are alike; of those alike to it, a key does not count against the newest.

    Raises:
        ValueError: if ``weight`` is outside 0 to 1, ``window`` below 1, ``kernel`` not odd, or ``threshold`` no cosine.
    """

    def __init__(self, weight: float = 0.07, window: int = 8, kernel: int = 7, threshold: float = 0.5) -> None:
        self.weight, self.window = between("weight", weight, 0, 1), whole("window", window)
        self.kernel, self.threshold = odd("kernel", kernel), between("threshold", threshold, -1, 1)

    def score(self, ctx: Context) -> torch.Tensor:
        ctx = self.windowed(ctx)
        importance = pool_max(mean_attention(ctx).amax(2), before_queries(ctx), self.kernel)
        return self.weight * importance - (1 - self.weight) * self._redundancy(ctx)

    def _redundancy(self, ctx: Context) -> torch.Tensor:
        """``[B, Hkv, T]``, sums to 1 over the tokens of a head."""
        keys = normalize(ctx.keys, dim=-1)
        batch, heads, tokens, _ = keys.shape
        total = torch.zeros(batch, heads, tokens, dtype=torch.float32, device=keys.device)
        step = max(1, _BLOCK_ELEMENTS // (batch * heads * tokens))
        for start in range(0, tokens, step):
            total += self._similarity(keys, start, start + step).sum(2)
        if ctx.held is None:
            return (total / tokens).softmax(-1)
        mean = total / ctx.held.sum(-1, keepdim=True).clamp_min(1)
        return mean.masked_fill(~ctx.held, torch.finfo(mean.dtype).min).softmax(-1)

    def _similarity(self, keys: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """``[B, Hkv, n, T]``: how much each of the keys ``start`` to ``stop`` counts against each key.

        Places without a token have keys of zeros, which are similar to nothing.
        """
        similar = keys[:, :, start:stop] @ keys.transpose(-1, -2)
        similar.diagonal(start, -2, -1).zero_()
        column = torch.arange(keys.shape[2], dtype=torch.int32, device=keys.device)
        newest = torch.where(similar > self.threshold, column, -1).amax(-1, keepdim=True).long()
        spared = newest.clamp_min(0)
        return similar.scatter_(-1, spared, similar.gather(-1, spared) * (newest < 0))
