"""Across: the heads of all layers compete for one budget, as in KVzip (arXiv:2505.23416)."""

from __future__ import annotations

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.registry import register
from hf_kvcache.eviction.wrapper import Wrapper
from hf_kvcache.utils.validation import between


@register("across", wraps=True)
class Across(Wrapper):
    """The best-scored tokens of all heads of all layers stay, so that heads and layers keep different numbers.

    That needs every layer at once: at ``cache.compress()``, or behind the prompt with ``evict_prefill="end"``. Where
    the cache is told to evict at other times (``evict_prefill="chunk"`` or ``interval=``), a layer chooses alone and
    only its own heads compete, as with ``ada``.

    Args:
        policy: the policy whose scores are compared; they should have one scale in all heads and layers, as ``reread``
            has.
        floor: share of an equal part that each head keeps at least.

    Raises:
        ValueError: if ``floor`` is outside 0 to 1.
    """

    def __init__(self, policy: Policy, floor: float = 0.1) -> None:
        super().__init__(policy)
        self.floor = between("floor", floor, 0, 1)

    @property
    def across_layers(self) -> bool:  # type: ignore[override]
        return True

    @property
    def head_floor(self) -> float | None:  # type: ignore[override]
        return self.floor
