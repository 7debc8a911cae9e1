"""Means and their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hf_kvcache_eval.cells import Metric


def mean_metric(samples: torch.Tensor | Sequence[float], higher_is_better: bool = True, unit: str = "") -> Metric:
    """The mean of independent samples ``[n]``, with the standard error of the mean (None for one sample)."""
    numbers = [float(x) for x in samples]
    return Metric(math.fsum(numbers) / len(numbers), standard_error(numbers), higher_is_better, unit, numbers)


def standard_error(numbers: Sequence[float]) -> float | None:
    """Standard error of the mean of independent samples; None for fewer than two."""
    count = len(numbers)
    if count < 2:
        return None
    mean = math.fsum(numbers) / count
    return math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / (count - 1) / count)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float | None]:
    """Mean of ``a - b`` over the same samples, and its standard error.

    Raises:
        ValueError: if there are not equally many.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} samples against {len(b)}: not the same ones")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return math.fsum(differences) / len(differences), standard_error(differences)
