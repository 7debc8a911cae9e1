"""Moments: the attention that a page can expect, from mean and deviation of its keys."""

from __future__ import annotations

import torch

from hf_kvcache.sparse.base import Selector
from hf_kvcache.sparse.registry import register
from hf_kvcache.utils.validation import whole


@register("moments")
class Moments(Selector):
    """Scores a page by the attention that the queries of a group are expected to pay to it.

    Of each half of a page mean and standard deviation of the keys are kept. Neighboring elements have one deviation
    together: its bytes are better spent on means of fewer tokens. Were the elements independent and normal, a query's
    scores over the tokens would have a known mean ``m`` and deviation ``s``, and the logarithm of the mean of their
    exponentials would be ``m + s^2 / 2``; Expected Attention (arXiv:2510.00636) takes the same step for queries over
    one key. Few tokens do not reach far from their mean, so beyond ``reach`` deviations the estimate goes on along its
    tangent. By these estimates each query head has probabilities of pages, which are added over the heads: a head
    counts as much as it attends, not as its scores are large.

    Args:
        span: tokens that have moments of their own; a page has the attention of all its parts. None is half a page.
        band: neighboring elements that have one deviation together, the root of the sum of their variances; where the
            width of a head is no multiple of it, their greatest common divisor. 1 is a deviation for each element.
        reach: from how many deviations on the estimate is a line; above 0. The largest of 16 normal numbers is 1.77
            deviations from their mean, on average.
        across: whether the KV heads of a layer share the pages that a step may read. The pages with the largest scores
            of all heads are read then, of one head at most twice as many as otherwise; probabilities are those among
            pages and sinks, so that a head that attends to the sinks mostly reads less.

    Raises:
        ValueError: for an option out of range.
    """

    vectors = 2
    rounding = 0, 0
    parts = 2
    taper = 0.3

    def __init__(self, span: int | None = None, reach: float = 1.77, across: bool = False, band: int = 8) -> None:
        self.span = None if span is None else whole("span", span, 1)
        self.band = whole("band", band, 1)
        if isinstance(reach, bool) or not isinstance(reach, int | float) or not 0 < reach < float("inf"):
            raise ValueError(f"reach={reach!r}; accepted: finite numbers above 0")
        self.reach = float(reach)
        if not isinstance(across, bool):
            raise ValueError(f"across={across!r}; accepted: True or False")
        self.across = across

    def summarize(self, keys: torch.Tensor, unused: torch.Tensor | None) -> torch.Tensor:
        if unused is None:
            deviation, mean = torch.std_mean(keys, 1, correction=0)
            return torch.stack([mean, deviation], 1)
        hidden, counts = unused.unsqueeze(-1), (~unused).sum(1)[:, None].clamp_min(1)
        mean = keys.masked_fill(hidden, 0.0).sum(1) / counts
        squares = (keys - mean.unsqueeze(1)).masked_fill(hidden, 0.0).square().sum(1) / counts
        return torch.stack([mean, squares.sqrt()], 1)
