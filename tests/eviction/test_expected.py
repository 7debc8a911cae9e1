"""Expected Attention against its formula in float64, one key at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hf_kvcache.eviction import resolve
from tests.eviction.brute_force import Head, heads_of
from tests.eviction.rope_contexts import CASES, biased, rotary_context, rotation
from tests.tolerances import Tolerance, assert_within

#: Positions times frequencies are float32 products: angles are off by some 1e-5 and scores in proportion.
TOLERANCE = Tolerance(1e-3, 1e-6)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"future": 20, "window": 7, "sinks": 0, "epsilon": 0.0},
    {"use_covariance": False, "use_values": False, "sinks": 2},
]


@pytest.mark.parametrize(("shape", "family"), CASES)
@pytest.mark.parametrize("options", OPTIONS)
def test_scores_equal_the_brute_force(shape: str, family: str, options: dict[str, Any]) -> None:
    policy = resolve("expected", **options)
    ctx = rotary_context(shape, family, policy)
    ctx = biased(ctx) if options else ctx
    scores = policy.score(ctx)
    assert scores.shape == ctx.positions.shape and scores.isfinite().all()
    for index, kv_head in heads_of(ctx):
        head = Head(ctx, index, kv_head)
        expected = torch.tensor(brute_force(policy, head, family))
        actual = scores[index, kv_head, : head.count]
        assert_within(actual, expected, TOLERANCE)


def brute_force(policy: Any, head: Head, family: str) -> list[float]:
    turn = sum(rotation(family, head.ctx.seen + step) for step in range(policy.future)) / policy.future
    typical = [i for i, at in enumerate(head.at) if at >= policy.sinks] or list(range(len(head.at)))
    total = np.zeros(head.count)
    for q in range(head.group):
        plain = np.array([rotation(family, head.at[i]).T @ head.queries[q, i] for i in typical])
        mean, covariance = plain.mean(0), np.cov(plain.T, bias=True)
        mean, covariance = turn @ mean, turn @ covariance @ turn.T
        exponent = [k @ mean * head.ctx.scoring.scaling for k in head.keys]
        if policy.use_covariance:
            factor = head.ctx.scoring.scaling**2 / 2
            exponent = [e + k @ covariance @ k * factor for e, k in zip(exponent, head.keys, strict=True)]
        weights = np.exp(np.array(exponent) + head.bias)
        others = [w for w, at in zip(weights, head.positions, strict=True) if at >= policy.sinks] or weights
        total += weights / sum(others) / head.group
    if not policy.use_values:
        return total.tolist()
    return [float((p + policy.epsilon) * np.linalg.norm(v)) for p, v in zip(total, head.values, strict=True)]


def test_it_asks_for_a_window_or_all_queries() -> None:
    assert resolve("expected").observed == -1 and resolve("expected", window=9).observed == 9


@pytest.mark.parametrize(("option", "value"), [("future", 0), ("window", 0), ("sinks", -1), ("epsilon", -0.1)])
def test_bad_options_are_named(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option}={value!r}; accepted: "):
        resolve("expected", **{option: value})
