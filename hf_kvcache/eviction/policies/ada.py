"""Ada-KV: the heads of a layer compete for its budget (arXiv:2407.11550)."""

from __future__ import annotations

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.registry import register
from hf_kvcache.eviction.wrapper import Wrapper
from hf_kvcache.utils.validation import between


@register("ada", wraps=True)
class Ada(Wrapper):
    """The best-scored tokens of all heads of a layer stay, so that heads keep different numbers.

    Args:
        policy: the policy whose scores are compared; they should have one scale in all heads, as attention has.
        floor: share of an equal part that each head keeps at least.

    Raises:
        ValueError: if ``floor`` is outside 0 to 1.
    """

    def __init__(self, policy: Policy, floor: float = 0.2) -> None:
        super().__init__(policy)
        self.floor = between("floor", floor, 0, 1)

    @property
    def head_floor(self) -> float | None:  # type: ignore[override]
        return self.floor
