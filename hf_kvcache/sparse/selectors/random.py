"""Random pages: the baseline that every selector has to beat."""

from __future__ import annotations

import torch

from hf_kvcache.sparse.base import Question, Selector
from hf_kvcache.sparse.registry import register
from hf_kvcache.utils.validation import whole

#: A large odd number, by which positions and pages become numbers without a pattern.
_FACTOR, _MASK = 0x9E3779B1, (1 << 32) - 1


@register("random")
class Random(Selector):
    """Picks pages at random: others at every step and in every layer and head, and the same in every run.

    Args:
        seed: of the choice.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = whole("seed", seed, 0)

    def score(self, question: Question) -> torch.Tensor:
        rows, queries, _ = question.query.shape
        device = question.query.device
        begin = (self.seed * 1_000_003 + question.layer_index) * 1_000_003 + question.position
        numbers = torch.arange(rows * question.columns, device=device).view(rows, 1, -1) + begin % _MASK * _FACTOR
        for shift in (16, 13, 16):
            numbers = ((numbers ^ (numbers >> shift)) * _FACTOR) & _MASK
        return numbers.float().expand(rows, queries, -1)
