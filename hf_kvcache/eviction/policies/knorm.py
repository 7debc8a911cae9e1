"""K-norm: short keys, which tend to get more attention than long ones (arXiv:2406.11430)."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.registry import register


@register("knorm")
class KNorm(Policy):
    """Minus the Euclidean norm of a key."""

    needs_values = False

    def score(self, ctx: Context) -> torch.Tensor:
        return -ctx.keys.norm(dim=-1)
