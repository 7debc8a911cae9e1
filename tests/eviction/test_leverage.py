"""Leverage against its definition in float64: a regression of each key on all others, a token at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hf_kvcache.eviction import resolve
from tests.eviction import brute_force as derived
from tests.eviction.brute_force import Head, heads_of
from tests.eviction.rope_contexts import CASES, rotary_context, rotation
from tests.tolerances import Tolerance, assert_near, assert_within

#: Keys are un-rotated in float32, and their leverage is a sum over as many products as there are tokens.
TOLERANCE = Tolerance(1e-3, 1e-3)


@pytest.mark.parametrize(("shape", "family"), CASES)
@pytest.mark.parametrize("options", [{}, {"kernel": 1, "ridge": 0.3}, {"kernel": 3, "ridge": 0.001}])
def test_scores_equal_the_brute_force(shape: str, family: str, options: dict[str, Any]) -> None:
    policy: Any = resolve("leverage", **options)
    ctx = rotary_context(shape, family, policy)
    scores = policy.score(ctx)
    for index, kv_head in heads_of(ctx):
        expected = torch.from_numpy(brute_force(policy, Head(ctx, index, kv_head), family))
        assert_within(scores[index, kv_head, : len(expected)], expected, TOLERANCE)


def brute_force(policy: Any, head: Head, family: str) -> np.ndarray:
    keys = np.array([rotation(family, at).T @ key for at, key in zip(head.positions, head.keys, strict=True)])
    keys = keys - keys.mean(0)
    gram = sum((np.outer(key, key) for key in keys), np.zeros((keys.shape[1], keys.shape[1])))
    inverse = np.linalg.pinv(gram + policy.ridge * np.trace(gram) / len(gram) * np.eye(len(gram)))
    single = [float(key @ inverse @ key) for key in keys]
    reach = policy.kernel // 2
    return np.array([np.mean(single[max(0, i - reach) : i + reach + 1]) for i in range(len(single))])


@pytest.mark.parametrize(("shape", "family"), CASES)
def test_rare_gives_each_head_a_share_by_leverage_and_the_rest_by_the_policy(shape: str, family: str) -> None:
    policy: Any = resolve("rare-snapkv", share=0.3, window=3)
    assert policy.needs_rope and policy.needs_states and policy.observed == 3
    ctx = rotary_context(shape, family, policy)
    scores, leverage = policy.score(ctx), resolve("leverage")
    for index, kv_head in heads_of(ctx):
        head = Head(ctx, index, kv_head)
        if head.count == 0:
            continue
        single = brute_force(leverage, head, family).tolist()
        stays = sum(head.protected)
        # Leverage of keys that are alike to the last digit would be ranked by rounding.
        ranked = sorted(x for x, protected in zip(single, head.protected, strict=True) if not protected)
        count = math.floor(max(0, ctx.quota - stays) * 0.3)
        if 0 < count < len(ranked) and ranked[-count] - ranked[-count - 1] < 1e-3:
            continue
        first = derived.keep(single, head.protected, stays + count)
        inner = derived.score(policy.policy, head)
        for token in range(head.count):
            if not head.protected[token]:
                expected = float(np.finfo(np.float32).max) if token in first else inner[token]
                assert_within(scores[index, kv_head, token], torch.tensor(expected), TOLERANCE)


@pytest.mark.parametrize("share", [-0.1, 1.5, True])
def test_a_share_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=rf"share={share!r}; accepted: numbers from 0 to 1"):
        resolve("rare-snapkv", share=share)


def test_equal_keys_have_equal_leverage_and_no_key_has_none() -> None:
    policy = resolve("leverage")
    ctx = rotary_context("ratio 3", "llama", policy)
    assert policy.score(replace(ctx, keys=torch.zeros_like(ctx.keys))).eq(0).all()


def test_a_sequence_of_a_batch_is_scored_as_alone() -> None:
    policy = resolve("leverage")
    ctx = rotary_context("ragged", "llama", policy)
    assert ctx.held is not None
    alone = replace(
        ctx, **{name: getattr(ctx, name)[1:] for name in ("keys", "values", "positions", "held", "protected")}
    )
    assert_near(policy.score(alone)[0], policy.score(ctx)[1])


@pytest.mark.parametrize("options", [{"kernel": 2}, {"kernel": 0}, {"ridge": 0.0}, {"ridge": 2}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        resolve("leverage", **options)
