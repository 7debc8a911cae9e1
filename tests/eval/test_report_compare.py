"""Verdicts, rankings and the Pareto front against numbers worked out the long way."""

from __future__ import annotations

import math
import random
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_kvcache_eval.cells import Metric
from hf_kvcache_eval.report.compare import BETTER, FEW, NOISE, UNKNOWN, WORSE, difference, pareto_front, verdict
from hf_kvcache_eval.report.formats import number
from hf_kvcache_eval.report.headline import mean_of
from hf_kvcache_eval.report.ranking import ranking
from hf_kvcache_eval.statistics import bootstrap_interval, mean_metric

SAMPLES = st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=2, max_size=12)


@given(SAMPLES, st.booleans())
def test_paired_differences_are_those_of_the_samples(pairs: list[tuple[float, float]], higher: bool) -> None:
    a, b = ([pair[i] for pair in pairs] for i in range(2))
    found = difference(mean_metric(a, higher), mean_metric(b, higher))
    own = [x - y for x, y in pairs]
    assert found.paired
    assert found.value == pytest.approx(fmean(own), abs=1e-9)
    assert found.stderr == pytest.approx(stdev(own) / math.sqrt(len(own)), abs=1e-9)
    if len(own) < 6:
        assert found.verdict == FEW and found.smallest is None
    elif sum(x != 0 for x in own) < 6:
        assert found.verdict == NOISE
    elif min(own) > 0 or max(own) < 0:  # no draw of the samples has another sign
        assert found.verdict == (BETTER if (fmean(own) > 0) == higher else WORSE)


def test_the_bootstrap_draws_the_samples_again() -> None:
    """Against the same draws one by one, and the percentile at which Student's t puts normal samples (t = 2.201)."""
    samples = [random.Random(3).gauss(1, 2) + i**1.5 for i in range(12)]
    tail = NormalDist().cdf(-math.sqrt(12 / 11) * 2.20099)
    draw = random.Random(0)
    means = sorted(fmean(draw.choices(samples, k=12)) for _ in range(20_000))
    expected = means[round(tail * 20_000)], means[round((1 - tail) * 20_000)]
    assert bootstrap_interval(samples) == pytest.approx(expected, abs=0.06 * (expected[1] - expected[0]))
    assert bootstrap_interval(samples) == bootstrap_interval(samples)
    with pytest.raises(ValueError, match="1 samples"):
        bootstrap_interval([1.0])


@pytest.mark.parametrize(
    ("count", "draw"),
    [
        (6, lambda rng, n: rng.normal(size=n)),
        (12, lambda rng, n: rng.lognormal(size=n) - rng.lognormal(size=n)),
        (50, lambda rng, n: rng.integers(0, 2, n) * 1.0 - rng.integers(0, 2, n)),
        (50, lambda rng, n: (rng.random(n) < 0.06) * rng.choice([-1.0, 1.0], n)),
    ],
)
def test_equal_methods_are_told_apart_about_as_often_as_is_said(count: int, draw: Any) -> None:
    rng = np.random.default_rng(5)
    zero = Metric(0.0, 0.0, samples=[0.0] * count)
    found = [difference(mean_metric(draw(rng, count)), zero).verdict for _ in range(200)]
    assert sum(one in (BETTER, WORSE) for one in found) / 200 <= 0.1  # 5 %, and three standard errors of 200 draws


def test_a_smallest_difference_is_told_apart() -> None:
    """A shift of a little more than it says is seen, a little less is not."""
    rng = random.Random(4)
    base, noise = [rng.gauss(0, 5) for _ in range(30)], [rng.gauss(0, 1) for _ in range(30)]
    other = [x + y for x, y in zip(base, noise, strict=True)]
    start = fmean(noise)
    for factor, expected in ((1.1, WORSE), (0.9, NOISE)):
        probe = difference(mean_metric([x + 9 for x in other], False), mean_metric(base, False)).smallest
        assert probe is not None
        shifted = mean_metric([x - start + factor * probe for x in other], False)
        assert difference(shifted, mean_metric(base, False)).verdict == expected


def test_five_samples_of_fifty_are_no_difference_of_right_and_wrong() -> None:
    right = [1.0] * 50
    for wrong, expected in ((5, NOISE), (6, WORSE)):
        found = difference(mean_metric([0.0] * wrong + [1.0] * (50 - wrong)), mean_metric(right))
        assert found.verdict == expected and found.smallest == pytest.approx(max(0.12, found.smallest or 0))


def test_pairing_finds_what_the_errors_alone_hide() -> None:
    hard = [random.Random(1).gauss(0, 1) + i for i in range(20)]
    a, b = mean_metric(hard), mean_metric([x - 0.1 - 0.001 * i for i, x in enumerate(hard)])
    assert difference(b, a).verdict == WORSE
    unpaired = difference(Metric(b.value, b.stderr), Metric(a.value, a.stderr))
    assert unpaired.verdict == NOISE and not unpaired.paired
    assert a.stderr is not None and b.stderr is not None
    assert unpaired.stderr == pytest.approx(math.sqrt(a.stderr**2 + b.stderr**2))


def test_samples_that_cannot_be_paired_are_not() -> None:
    assert not difference(mean_metric([1.0, 2.0]), mean_metric([1.0, 2.0, 3.0])).paired
    # A perplexity is not the mean of its samples' losses.
    perplexity = Metric(math.exp(1.5), 0.1, False, samples=[1.0, 2.0])
    assert not difference(perplexity, perplexity).paired


def test_without_errors_there_is_no_verdict() -> None:
    assert difference(Metric(1.0), Metric(2.0, 0.1)).verdict == UNKNOWN
    assert difference(Metric(1.0, samples=[1.0]), Metric(2.0, samples=[2.0])).verdict == UNKNOWN


@pytest.mark.parametrize(
    ("value", "stderr", "higher", "expected"),
    [
        (0.0, 0.0, True, NOISE),
        (2.0, 1.0, True, NOISE),
        (2.1, 1.0, True, BETTER),
        (2.1, 1.0, False, WORSE),
        (-2.1, 1.0, True, WORSE),
        (-2.1, 1.0, False, BETTER),
        (1e-9, 0.0, True, BETTER),
        (1.0, None, True, UNKNOWN),
    ],
)
def test_verdicts(value: float, stderr: float | None, higher: bool, expected: str) -> None:
    assert verdict(value, stderr, higher) == expected


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_pareto_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    def dominated(p: tuple[int, int]) -> bool:
        return any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)

    expected = {i for i, point in enumerate(points) if not dominated(point)}
    front = pareto_front(points)
    assert set(front) == expected and len(front) == len(expected)
    assert [points[i] for i in front] == sorted(points[i] for i in front)


def test_neighbors_are_ranked_with_a_sign_between_them() -> None:
    base = [random.Random(2).gauss(0, 1) + i for i in range(10)]
    shifts = {"a": 5.0, "b": 0.05, "c": 5.04, "d": 0.0, "e": 90.0}
    metrics = {
        name: mean_metric(
            [x + shift + 0.1 * random.Random(f"{name}{i}").gauss(0, 1) for i, x in enumerate(base)], False
        )
        for name, shift in shifts.items()
    }
    order = sorted(shifts, key=lambda name: metrics[name].value)
    words = ranking(metrics).split(". ")[0].replace("`", "").split(" ")
    assert words[::2] == order and words[1::2] == ["=", ">", "=", ">"]
    assert "Smallest difference of neighbors that is told apart: " in ranking(metrics)
    few = {name: mean_metric(metric.samples[:5], False) for name, metric in metrics.items()}
    assert ranking(few).replace("`", "").split(" ")[1::2] == ["?"] * 4
    higher = {name: mean_metric(metric.samples) for name, metric in metrics.items()}
    assert ranking(higher).split("`")[1] == "e"


def test_the_error_of_a_mean_over_tasks() -> None:
    mean = mean_of([Metric(0.4, 0.03), Metric(0.6, 0.04)])
    assert mean.value == pytest.approx(0.5) and mean.stderr == pytest.approx(0.025)
    assert mean_of([Metric(0.4, 0.03), Metric(0.6)]).stderr is None


@pytest.mark.parametrize(
    ("value", "stderr", "expected"),
    [
        (None, None, "–"),
        (0.123456, None, "0.123"),
        (0.0, 0.0, "0 ± 0"),
        (0.45678, 0.0213, "0.457 ± 0.021"),
        (2345.6, 12.3, "2346 ± 12"),
        (20.71, 3.456, "20.7 ± 3.5"),
        (1.294e-4, 1.6e-5, "(1.29 ± 0.16)e-4"),
        (-1.2e-5, 9.1e-5, "(-1.2 ± 9.1)e-5"),
    ],
)
def test_numbers_have_the_digits_that_their_errors_bear_out(
    value: float | None, stderr: float | None, expected: str
) -> None:
    assert number(value, stderr) == expected
