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
        rows, length, columns = question.rows, question.length, question.columns
        begin = (self.seed * 1_000_003 + question.layer_index) * 1_000_003
        places = torch.arange(rows * length * columns, device=question.device).view(rows, length, columns)
        numbers = places + (begin + question.position) % _MASK * _FACTOR % _MASK
        for shift in (16, 13, 16):
            numbers = ((numbers ^ (numbers >> shift)) * _FACTOR) & _MASK
        return numbers.float()
