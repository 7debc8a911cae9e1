"""Which differences are larger than the noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from hf_kvcache_eval.cells import Metric
from hf_kvcache_eval.statistics import LEAST, bootstrap_interval, standard_error

#: Standard errors that a difference has to exceed where there are no samples to draw from.
ERRORS = 2.0
#: Mean KL up to which a cache counts as lossless: what float32 makes of equal distributions, of either sign.
LOSSLESS = 1e-7
WORSE, BETTER, NOISE, UNKNOWN, FEW = "worse", "better", "within noise", "no standard error", "too few samples"


@dataclass(frozen=True)
class Difference:
    """A metric minus its reference.

    Attributes:
        value: the difference of the values.
        stderr: its standard error; None where one of the two has none.
        paired: taken sample by sample, so that what makes a sample hard for both cancels.
        verdict: worse, better, within noise, too few samples, or no standard error.
        smallest: the difference from which on these samples tell two methods apart; None where that is not known.
    """

    value: float
    stderr: float | None
    paired: bool
    verdict: str
    smallest: float | None = None


def difference(metric: Metric, reference: Metric) -> Difference:
    """``metric - reference``.

    Over the same samples, where both have them, by the paired bootstrap: the methods differ where its interval leaves
    out zero and at least ``LEAST`` samples differ. Else with the standard errors added in quadrature.
    """
    higher = metric.higher_is_better
    if not _can_pair(metric, reference):
        value = metric.value - reference.value
        known = metric.stderr is not None and reference.stderr is not None
        stderr = math.hypot(metric.stderr or 0.0, reference.stderr or 0.0) if known else None
        return Difference(value, stderr, False, verdict(value, stderr, higher), stderr and ERRORS * stderr)
    pairs = list(zip(metric.samples, reference.samples, strict=True))
    own = [x - y for x, y in pairs]
    value, stderr = fmean(own), standard_error(own)
    if len(own) < LEAST:
        return Difference(value, stderr, True, FEW if stderr is not None else UNKNOWN)
    low, high = bootstrap_interval(own)
    smallest = value - low if value > 0 else high - value
    if all(x in (0.0, 1.0) for pair in pairs for x in pair):
        smallest = max(smallest, LEAST / len(own))
    apart = (low > 0 or high < 0) and sum(x != 0 for x in own) >= LEAST
    return Difference(value, stderr, True, _direction(value, higher) if apart else NOISE, smallest)


def verdict(value: float, stderr: float | None, higher_is_better: bool) -> str:
    """What a difference means, given nothing but its standard error."""
    if stderr is None:
        return UNKNOWN
    return NOISE if abs(value) <= ERRORS * stderr else _direction(value, higher_is_better)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points ``(cost, loss)`` that no other beats in one and equals or beats in the other, by cost."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[index][1] < points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def _direction(value: float, higher_is_better: bool) -> str:
    return BETTER if (value > 0) == higher_is_better else WORSE


def _can_pair(a: Metric, b: Metric) -> bool:
    """Whether the metrics are means of equally many samples; a perplexity, say, is not the mean of its samples."""
    if not a.samples or len(a.samples) != len(b.samples):
        return False
    return all(math.isclose(fmean(m.samples), m.value, rel_tol=1e-6, abs_tol=1e-9) for m in (a, b))
