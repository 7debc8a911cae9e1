"""Quest (arXiv:2406.10774): the product that a query may have with a key within a page's bounds."""

from __future__ import annotations

import torch

from hf_kvcache.sparse.base import Selector
from hf_kvcache.sparse.registry import register
from hf_kvcache.utils.validation import between, whole


@register("quest")
class Quest(Selector):
    """Scores a page by what the queries of a group may find in it.

    The bounds of a page are its smallest and its largest key, element by element. The score is the sum over the query
    heads of ``q * middle + range_weight * |q| * half`` over the elements, where ``middle`` is the middle of the bounds
    and ``half`` half of their distance. With a weight of 1 this is the largest product that a query can have within the
    bounds, as in the paper. Keys are far from reaching it in all elements at once, so a smaller weight tells pages
    apart better.

    Args:
        span: tokens that have bounds of their own; a page has the score of its best part. None is a whole page.
        range_weight: of the bounds' distance, 0 to 1.
    """

    vectors = 2
    rounding = 1, -1

    def __init__(self, span: int | None = None, range_weight: float = 0.3) -> None:
        self.span = None if span is None else whole("span", span, 1)
        self.range_weight = between("range_weight", range_weight, 0, 1)

    @property
    def size_weights(self) -> tuple[float, float]:
        # Twice the score: middle and half are half of the bounds' sum and of their difference.
        return self.range_weight, -self.range_weight

    def summarize(self, keys: torch.Tensor, unused: torch.Tensor | None) -> torch.Tensor:
        if unused is None:
            return torch.stack([keys.amax(1), keys.amin(1)], 1)
        hidden, empty = unused.unsqueeze(-1), unused.all(1)[:, None, None]
        high = keys.masked_fill(hidden, -torch.inf).amax(1)
        low = keys.masked_fill(hidden, torch.inf).amin(1)
        return torch.stack([high, low], 1).masked_fill(empty, 0.0)
