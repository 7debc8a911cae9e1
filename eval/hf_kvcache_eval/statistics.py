"""Means, their standard errors, and paired bootstrap intervals of differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from hf_kvcache_eval.cells import Metric

#: How often two equal methods are told apart by chance, at most, in one comparison.
LEVEL = 0.05
#: Samples that have to differ before two methods can be told apart. If neither is better, all of fewer point the same
#: way too often: five of them in 2 of 32 cases.
LEAST = math.ceil(1 - math.log2(LEVEL))
#: Resamples of the bootstrap; of more than ``_MANY`` samples, whose tails are less far out, fewer.
RESAMPLES, _FEWER, _MANY = 10_000, 2_000, 1_000
_SEED = 0


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


def bootstrap_interval(samples: Sequence[float]) -> tuple[float, float]:
    """An interval that holds the mean of independent samples with a probability of ``1 - LEVEL``.

    The samples are drawn with replacement ``RESAMPLES`` times, always with the same seed. The interval lies between two
    percentiles of the means of the draws. Percentiles of few samples are too narrow; they are widened as Hesterberg
    says (arXiv:1411.5279, the expanded percentile interval), so that the interval is that of Student's t where the
    samples are normal.

    Raises:
        ValueError: for fewer than two samples.
    """
    numbers = np.asarray(samples, dtype=np.float64)
    if len(numbers) < 2:
        raise ValueError(f"{len(numbers)} samples; accepted: at least 2")
    tail = _widened_tail(len(numbers))
    low, high = np.quantile(_draws(len(numbers)) @ numbers / len(numbers), [tail, 1 - tail])
    return float(low), float(high)


@lru_cache(maxsize=2)
def _draws(count: int) -> np.ndarray[Any, Any]:
    """How often each of ``count`` samples is drawn, float64 ``[resamples, count]``."""
    resamples = RESAMPLES if count <= _MANY else _FEWER
    return np.random.default_rng(_SEED).multinomial(count, np.full(count, 1 / count), resamples).astype(np.float64)


def _widened_tail(count: int) -> float:
    """The share of the means of the draws that lies beyond each end of the interval."""
    normal = NormalDist()
    z, degrees = normal.inv_cdf(1 - LEVEL / 2), count - 1
    return normal.cdf(-math.sqrt(count / degrees) * _student(z, degrees))


def _student(z: float, degrees: int) -> float:
    """The quantile of Student's t at which the normal distribution has ``z`` (expansion in ``1 / degrees``)."""
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))
