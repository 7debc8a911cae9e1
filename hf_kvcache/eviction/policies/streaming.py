"""StreamingLLM: the newest tokens, behind the sinks that every policy keeps (arXiv:2309.17453)."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.registry import register


@register("streaming")
class Streaming(Policy):
    """Newer is better.

    Args:
        reindex: move the sinks' keys along with the window, as the paper does by positions inside the cache: distances
            within the window are the same either way, so it is enough to rotate the sinks.
    """

    needs_states = False
    needs_values = False

    def __init__(self, reindex: bool = False) -> None:
        self.reindex = reindex

    @property
    def moves_sinks(self) -> bool:  # type: ignore[override]
        return self.reindex

    def recent(self, quota: int) -> int:
        return quota

    def score(self, ctx: Context) -> torch.Tensor:
        # Float64 tells positions apart that float32 does not.
        return ctx.positions.double()
