"""Landmarks: the product of a query with the mean key of a page."""

from __future__ import annotations

import torch

from hf_kvcache.sparse.base import Selector
from hf_kvcache.sparse.registry import register
from hf_kvcache.utils.validation import whole


@register("landmark")
class Landmark(Selector):
    """Scores a page by the product of the mean of its keys with the queries of a group, summed over the query heads.

    Args:
        span: tokens that have a mean of their own; a page has the score of its best part. None is a whole page.
    """

    vectors = 1
    rounding = (0,)
    size_weights = (0.0,)

    def __init__(self, span: int | None = None) -> None:
        self.span = None if span is None else whole("span", span, 1)

    def summarize(self, keys: torch.Tensor, unused: torch.Tensor | None) -> torch.Tensor:
        if unused is None:
            return keys.mean(1, keepdim=True)
        counts = (~unused).sum(1)[:, None, None].clamp_min(1)
        return keys.masked_fill(unused.unsqueeze(-1), 0.0).sum(1, keepdim=True) / counts
