"""Threshold: keep what scores above a number, with the budget as the most that may stay (arXiv:2601.07891)."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.registry import register
from hf_kvcache.eviction.wrapper import Wrapper
from hf_kvcache.utils.validation import between

#: Scores are float32.
_LARGEST = torch.finfo(torch.float32).max


@register("threshold", wraps=True)
class Threshold(Wrapper):
    """Tokens stay that score above ``tau``, and of these the best up to the budget.

    So heads keep different numbers of tokens, each as many as it needs, behind a prompt and at every eviction while
    decoding, also where the budget has room for more. Sinks, newest tokens and pins stay in any case. KVzap keeps
    tokens in this way, by scores of its own.

    Args:
        policy: the policy that gives the scores.
        tau: tokens with this score or a lower one go. It is in units of the policy's scores: the default is a
            probability of 0.001, for policies that score by attention.

    Raises:
        ValueError: if ``tau`` is not a finite number.
    """

    def __init__(self, policy: Policy, tau: float = 1e-3) -> None:
        super().__init__(policy)
        self.tau = between("tau", tau, -_LARGEST, _LARGEST)

    @property
    def keeps_above(self) -> float | None:  # type: ignore[override]
        return self.tau
