"""What policies say of options that they cannot take, and what their options do to budgets."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hf_kvcache.eviction import Policy, available, resolve
from tests.choosing import pairwise

BAD = [
    ("snapkv", "window", 0, "whole numbers from 1"),
    ("snapkv", "window", 2.0, "whole numbers from 1"),
    ("snapkv", "window", True, "whole numbers from 1"),
    ("snapkv", "kernel", 4, "odd numbers from 1"),
    ("snapkv", "kernel", -1, "odd numbers from 1"),
    ("pyramidkv", "window", -3, "whole numbers from 1"),
    ("pyramidkv", "beta", 0.5, "numbers from 1 to inf"),
    ("h2o", "normalize", "yes", "True, False"),
    ("scissorhands", "window", 0, "whole numbers from 1"),
    ("scissorhands", "newest", -1, "whole numbers from 0"),
    ("tova", "per_head", 1, "True, False"),
    ("morphkv", "window", "8", "whole numbers from 1"),
    ("morphkv", "fuse", "mean", "'sum', 'max'"),
    ("rkv", "weight", 1.5, "numbers from 0 to 1"),
    ("rkv", "weight", float("nan"), "numbers from 0 to 1"),
    ("rkv", "window", 0, "whole numbers from 1"),
    ("rkv", "kernel", 2, "odd numbers from 1"),
    ("rkv", "threshold", 2, "numbers from -1 to 1"),
    ("lagkv", "lag", 0, "whole numbers from 1"),
    ("lagkv", "sinks", -1, "whole numbers from 0"),
    ("lagkv", "across", None, "True, False"),
    ("ada-knorm", "floor", 1.1, "numbers from 0 to 1"),
    ("critical-h2o", "first", -0.1, "numbers from 0 to 1"),
    ("critical-h2o", "epsilon", -1, "numbers from 0 to inf"),
    ("dropkv", "window", 0, "whole numbers from 1"),
    ("chunk-snapkv", "length", 0, "whole numbers from 1"),
    ("gate", "window", -1, "whole numbers from 0"),
    ("gate", "spread", "even", "'calibrated', 'uniform'"),
    ("gate", "gate", 3, "a Gate, the path of a file"),
    ("threshold-snapkv", "tau", float("inf"), "numbers from -3.4"),
    ("threshold-snapkv", "tau", None, "numbers from -3.4"),
]


@pytest.mark.parametrize(("policy", "option", "value", "accepted"), BAD)
def test_bad_options_are_named(policy: str, option: str, value: Any, accepted: str) -> None:
    with pytest.raises(ValueError) as error:
        resolve(policy, **{option: value})
    assert f"{option}={value!r}" in str(error.value) and f"accepted: {accepted}" in str(error.value)


@pytest.mark.parametrize("name", ["nope", "ada", "critical-ada", "snapkv-ada", "ada-", "", "knorm-snapkv"])
def test_unknown_names_are_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError) as error:
        resolve(name)
    assert f"policy={name!r}" in str(error.value) and all(known in str(error.value) for known in [*available(), "ada-"])


def test_unknown_options_are_answered_with_the_known_ones() -> None:
    with pytest.raises(TypeError, match="no option 'windows'; accepted: floor, kernel, window"):
        resolve("ada-snapkv", windows=3)


def test_policies_of_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="policy must be a name or a Policy, got int"):
        resolve(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="policy must be a Policy, got str"):
        type(resolve("ada-snapkv"))("snapkv")  # type: ignore[call-arg]


def test_a_ready_policy_stays_and_takes_no_options() -> None:
    ready = resolve("snapkv", window=8)
    assert resolve(ready) is ready
    with pytest.raises(ValueError, match="window cannot be given beside it"):
        resolve(ready, window=9)


def test_a_policy_asks_for_gate_scores_or_accumulated_attention() -> None:
    """Not for both: one number is kept beside each token."""
    both = type("Both", (type(resolve("h2o")),), {"needs_hidden": True})()
    for policy in (both, type(resolve("ada-snapkv"))(both)):  # type: ignore[call-arg]
        with pytest.raises(ValueError, match=r"both needs_hidden and needs_accumulated.*accepted: one of the two"):
            resolve(policy)


def test_options_reach_the_policy_or_wrapper_that_has_them() -> None:
    policy = resolve("ada-critical-snapkv", window=16, floor=0.3, first=0.4)
    shown = "ada(policy=critical(policy=snapkv(window=16, kernel=5), first=0.4, epsilon=0.0001), floor=0.3)"
    assert repr(policy) == shown
    assert (policy.observed, policy.recent(100), policy.head_floor, policy.needs_output) == (16, 16, 0.3, True)


def inside(name: str, **options: Any) -> list[Policy]:
    return [
        resolve(f"{front}{name}", **options) for front in ("", "ada-", "critical-", "critical-ada-", "chunk-threshold-")
    ]


def test_wrappers_want_what_the_policy_inside_wants() -> None:
    for name in set(available()) - {"random"}:
        plain = resolve(name)
        for policy in inside(name)[1:]:
            for wish in (
                "observed",
                "needs_accumulated",
                "needs_replay",
                "replay_by_head",
                "replay_squares",
                "needs_rope",
                "needs_hidden",
            ):
                assert getattr(policy, wish) == getattr(plain, wish)
            assert policy.recent(50) == plain.recent(50)
            assert policy.layer_quota(50, 1, 4, 8, 90) == plain.layer_quota(50, 1, 4, 8, 90)
    assert [policy.needs_output for policy in inside("knorm")] == [False, False, True, True, False]
    assert [policy.head_floor for policy in inside("knorm")] == [None, 0.2, None, 0.2, None]
    assert [policy.keeps_above for policy in inside("knorm")] == [None] * 4 + [1e-3]


@pytest.mark.parametrize(
    ("policy", "kept"),
    [("h2o", 10), ("snapkv", 6), ("scissorhands", 10), ("morphkv", 6), ("rkv", 6), ("streaming", 21), ("tova", 0)],
)
def test_recent_tokens_never_exceed_the_quota(policy: str, kept: int) -> None:
    assert resolve(policy).recent(21) == kept
    assert all(0 <= resolve(policy).recent(quota) <= quota for quota in range(100))


@pairwise("quota, layers, beta", [1, 64, 65, 100, 1024], [1, 2, 3, 30, 31], [1, 2.5, 20])
def test_a_pyramid_keeps_the_budget_falls_and_spares_the_window(quota: int, layers: int, beta: float) -> None:
    policy = resolve("pyramidkv", beta=beta)
    quotas = [policy.layer_quota(quota, place, layers, 0, 10**6) for place in range(layers)]
    assert sum(quotas) == layers * quota
    window = min(64, math.ceil(quota / 4))
    assert quotas == sorted(quotas, reverse=True) and quotas[-1] >= window
    if layers > 1:
        spare = quota - window
        assert abs(quotas[-1] - window - spare / beta) < 1
        steps = [upper - lower for lower, upper in zip(quotas[1:], quotas, strict=False)]
        assert max(steps) - min(steps) <= 2, "the fall is a straight line, but for rounding"


def test_keepall_keeps_more_than_there_can_be() -> None:
    assert resolve("keepall").layer_quota(1, 0, 4, 0, 9) > 10**12
