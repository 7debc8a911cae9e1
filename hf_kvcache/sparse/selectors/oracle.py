"""The pages with the most attention, computed by reading everything: the best that a selector of pages can do."""

from __future__ import annotations

from hf_kvcache.sparse.base import Selector
from hf_kvcache.sparse.registry import register


@register("oracle")
class Oracle(Selector):
    """Picks the pages with the largest attention probabilities. It reads everything first, so it is for evaluation."""

    exact = True
