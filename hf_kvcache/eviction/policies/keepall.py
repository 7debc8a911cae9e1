"""Keep-all: the baseline that drops nothing, whatever the budget."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.registry import register

#: More tokens than any layer can hold, and few enough to be multiplied by heads in 64 bits.
_EVERY_TOKEN = 1 << 40


@register("keepall")
class KeepAll(Policy):
    """Every layer's quota is more than it can hold."""

    needs_states = False
    needs_values = False

    def layer_quota(self, quota: int, evicting_index: int, num_evicting: int, least: int, most: int) -> int:
        return _EVERY_TOKEN

    def score(self, ctx: Context) -> torch.Tensor:
        return torch.zeros(ctx.positions.shape, dtype=torch.float32, device=ctx.keys.device)
