"""KeyDiff: keys that point elsewhere than the others (arXiv:2504.15364)."""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity, normalize

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.registry import register


@register("keydiff")
class KeyDiff(Policy):
    """Minus the cosine between a key and the mean direction of the keys of its head."""

    needs_values = False

    def score(self, ctx: Context) -> torch.Tensor:
        # A cosine has no scale, so the sum does for the mean; places without a token add zeros.
        anchor = normalize(ctx.keys, dim=-1).sum(2, keepdim=True)
        return -cosine_similarity(ctx.keys, anchor, dim=-1)
