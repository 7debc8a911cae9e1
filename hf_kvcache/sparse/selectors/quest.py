"""Quest (arXiv:2406.10774): the largest product that a query can have with any key within a page's bounds."""

from __future__ import annotations

import torch

from hf_kvcache.sparse.base import Selector
from hf_kvcache.sparse.registry import register
from hf_kvcache.utils.validation import whole


@register("quest")
class Quest(Selector):
    """Scores a page by its largest possible product with the query, ``sum over d of max(q_d * min_d, q_d * max_d)``.

    ``min`` and ``max`` are taken element by element over the keys of the page. A positive ``q_d`` meets ``max_d`` and a
    negative one ``min_d``, so the score is one product of ``[max, min]`` with the positive and the negative part of q.

    Args:
        span: tokens that have bounds of their own; a page has the score of its best part. None is a whole page.
    """

    vectors = 2
    rounding = 1, -1
    by_sign = True

    def __init__(self, span: int | None = None) -> None:
        self.span = None if span is None else whole("span", span, 1)

    def summarize(self, keys: torch.Tensor, unused: torch.Tensor | None) -> torch.Tensor:
        if unused is None:
            return torch.stack([keys.amax(1), keys.amin(1)], 1)
        hidden, empty = unused.unsqueeze(-1), unused.all(1)[:, None, None]
        high = keys.masked_fill(hidden, -torch.inf).amax(1)
        low = keys.masked_fill(hidden, torch.inf).amin(1)
        return torch.stack([high, low], 1).masked_fill(empty, 0.0)

    def ask(self, query: torch.Tensor) -> torch.Tensor:
        return torch.cat([query.clamp_min(0), query.clamp_max(0)], -1)
