"""Which differences are larger than the noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from hf_kvcache_eval.cells import Metric
from hf_kvcache_eval.statistics import paired_difference

#: Standard errors that a difference has to exceed to count as one.
ERRORS = 2.0
#: Mean KL up to which a cache counts as lossless: what float32 makes of equal distributions, of either sign.
LOSSLESS = 1e-7
WORSE, BETTER, NOISE, UNKNOWN = "worse", "better", "within noise", "no standard error"


@dataclass(frozen=True)
class Difference:
    """A metric minus its reference.

    Attributes:
        value: the difference of the values.
        stderr: its standard error; None where one of the two has none.
        paired: taken sample by sample, so that what makes a sample hard for both cancels.
        verdict: worse, better, within noise, or no standard error.
    """

    value: float
    stderr: float | None
    paired: bool
    verdict: str


def difference(metric: Metric, reference: Metric) -> Difference:
    """``metric - reference``: over the same samples where both have them, else with the errors added in quadrature."""
    paired = _can_pair(metric, reference)
    if paired:
        value, stderr = paired_difference(metric.samples, reference.samples)
    else:
        value = metric.value - reference.value
        known = metric.stderr is not None and reference.stderr is not None
        stderr = math.hypot(metric.stderr or 0.0, reference.stderr or 0.0) if known else None
    return Difference(value, stderr, paired, verdict(value, stderr, metric.higher_is_better))


def verdict(value: float, stderr: float | None, higher_is_better: bool) -> str:
    """What a difference means, given its standard error."""
    if stderr is None:
        return UNKNOWN
    if abs(value) <= ERRORS * stderr:
        return NOISE
    return BETTER if (value > 0) == higher_is_better else WORSE


def groups(names: Sequence[str], metric_of: Callable[[str], Metric]) -> list[list[str]]:
    """Runs of two or more neighbors, best first, of which no two are told apart; a name is in one run at most."""
    lower_first = sorted(names, key=lambda name: metric_of(name).value)
    runs: list[list[str]] = []
    for name in lower_first:
        if runs and all(difference(metric_of(name), metric_of(other)).verdict == NOISE for other in runs[-1]):
            runs[-1].append(name)
        else:
            runs.append([name])
    return [run for run in runs if len(run) > 1]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points ``(cost, loss)`` that no other beats in one and equals or beats in the other, by cost."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[index][1] < points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def _can_pair(a: Metric, b: Metric) -> bool:
    """Whether the metrics are means of equally many samples; a perplexity, say, is not the mean of its samples."""
    if not a.samples or len(a.samples) != len(b.samples):
        return False
    return all(math.isclose(fmean(m.samples), m.value, rel_tol=1e-6, abs_tol=1e-9) for m in (a, b))
