"""Random: the baseline that a method has to beat (arXiv:2609.03430)."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.registry import register


@register("random")
class Random(Policy):
    """A uniform draw per KV head and token, the same for every sequence of a batch."""

    needs_states = False
    needs_values = False

    def score(self, ctx: Context) -> torch.Tensor:
        batch, heads, tokens, _ = ctx.keys.shape
        draws = torch.rand(heads, tokens, generator=ctx.generator(), dtype=torch.float32, device="cpu")
        return draws.to(ctx.keys.device, non_blocking=True).expand(batch, -1, -1)
