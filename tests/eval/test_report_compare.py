"""Verdicts, groups and the Pareto front against numbers worked out the long way."""

from __future__ import annotations

import itertools
import math
import random
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_kvcache_eval.cells import Metric
from hf_kvcache_eval.report.compare import BETTER, NOISE, UNKNOWN, WORSE, difference, groups, pareto_front, verdict
from hf_kvcache_eval.report.formats import number
from hf_kvcache_eval.report.headline import mean_of
from hf_kvcache_eval.statistics import mean_metric

SAMPLES = st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=2, max_size=12)


@given(SAMPLES, st.booleans())
def test_paired_differences_are_those_of_the_samples(pairs: list[tuple[float, float]], higher: bool) -> None:
    a, b = ([pair[i] for pair in pairs] for i in range(2))
    found = difference(mean_metric(a, higher), mean_metric(b, higher))
    own = [x - y for x, y in pairs]
    assert found.paired
    assert found.value == pytest.approx(fmean(own), abs=1e-9)
    assert found.stderr == pytest.approx(stdev(own) / math.sqrt(len(own)), abs=1e-9)
    if abs(abs(fmean(own)) - 2 * stdev(own) / math.sqrt(len(own))) > 1e-9:
        noise = abs(fmean(own)) < 2 * stdev(own) / math.sqrt(len(own))
        assert found.verdict == (NOISE if noise else BETTER if (fmean(own) > 0) == higher else WORSE)


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


def test_groups_are_runs_in_which_no_two_differ() -> None:
    base = [random.Random(2).gauss(0, 1) + i for i in range(10)]
    shifts = {"a": 0.0, "b": 0.05, "c": 0.1, "d": 5.0, "e": 5.04, "f": 90.0}
    metrics = {
        name: mean_metric(
            [x + shift + 0.1 * random.Random(f"{name}{i}").gauss(0, 1) for i, x in enumerate(base)], False
        )
        for name, shift in shifts.items()
    }
    found = groups(list(shifts), metrics.__getitem__)
    order = sorted(shifts, key=lambda name: metrics[name].value)
    for run in found:
        assert len(run) > 1 and "".join(run) in "".join(order)
        for a, b in itertools.combinations(run, 2):
            assert difference(metrics[a], metrics[b]).verdict == NOISE
    assert not any("f" in run for run in found)
    assert not any({"c", "d"} <= set(run) for run in found)
    assert ["d", "e"] in [sorted(run) for run in found]


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
