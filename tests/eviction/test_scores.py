"""Scores, and the tokens that they keep, against the brute force."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_kvcache.eviction import Context, Policy, available, context, output_lengths, resolve
from hf_kvcache.eviction.policies import critical, rkv
from hf_kvcache.eviction.registry import wrappers
from tests.choosing import chosen
from tests.eviction import brute_force, contexts
from tests.eviction.contexts import SHAPES, random_context, shown
from tests.tolerances import TOLERANCES, assert_near

#: Policies that are tested elsewhere: they need replays or rotary positions, or have no score to derive.
ELSEWHERE = {
    "compactor", "expected", "gate", "kvzip", "kvzipplus", "leverage", "random", "rare", "reread", "rms",
    "triattention",
}  # fmt: skip

POLICIES: dict[str, dict[str, Any]] = {
    "h2o": {},
    "h2o normalized": {"normalize": True},
    "scissorhands": {},
    "scissorhands small": {"window": 7, "newest": 2},
    "tova": {},
    "tova per head": {"per_head": True},
    "snapkv": {},
    "snapkv small": {"window": 6, "kernel": 3},
    "snapkv wide": {"window": 2, "kernel": 99},
    "pyramidkv": {"window": 5, "kernel": 7},
    "morphkv": {},
    "morphkv small": {"window": 6},
    "morphkv max": {"window": 6, "fuse": "max"},
    "rkv": {},
    "rkv small": {"weight": 0.9, "window": 3, "kernel": 5, "threshold": 0.1},
    "keydiff": {},
    "knorm": {},
    "lagkv": {},
    "lagkv small": {"lag": 4, "sinks": 2},
    "lagkv across": {"lag": 5, "sinks": 0, "across": True},
    "dropkv": {},
    "dropkv small": {"window": 3},
    "streaming": {},
    "keepall": {},
    "ada-snapkv": {"window": 6},
    "ada-critical-snapkv": {"window": 6},
    "critical-ada-snapkv": {"window": 6, "first": 0.25},
    "critical-keydiff": {"epsilon": 0.01},
    "critical-h2o": {},
    "chunk-snapkv": {"window": 6},
    "chunk-keydiff": {"length": 3},
    "chunk-critical-dropkv": {"window": 6, "length": 5},
    "threshold-ada-dropkv": {"tau": 0.02},
    "across-snapkv": {"window": 6},
}


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    return build(request.param)


#: Shapes that every policy can get wrong in a way of its own.
ALWAYS = ("one token", "few tokens", "ragged, ratio 8", "capped", "more protected than quota")


def cases() -> list[tuple[str, str]]:
    """Each policy with these, and with one of the others in turn."""
    others = [shape for shape in SHAPES if shape not in ALWAYS]
    return [
        (case, shape)
        for place, case in enumerate(POLICIES)
        for shape in (*ALWAYS, others[place % len(others)])
        if " " not in case or shape not in ALWAYS[:2]  # options have no say where there are next to no tokens
    ]


def build(case: str) -> Policy:
    return resolve(case.split()[0], **POLICIES[case])


def test_every_policy_is_listed() -> None:
    named = {name for case in POLICIES for name in case.split()[0].split("-")}
    assert named | ELSEWHERE >= set(available()) | set(wrappers())
    assert named == set(brute_force.SCORES)


@chosen("case, shape", POLICIES, SHAPES, fast=cases())
def test_scores_and_kept_tokens_equal_the_brute_force(case: str, shape: str) -> None:
    policy = build(case)
    ctx = shown(random_context(SHAPES[shape]), policy)
    scores = policy.score(ctx)
    assert scores.shape == ctx.positions.shape
    for index, kv_head in brute_force.heads_of(ctx):
        head = brute_force.Head(ctx, index, kv_head)
        expected = brute_force.score(policy, head)
        actual = scores[index, kv_head, : head.count]
        assert_near(actual, torch.tensor(expected, dtype=torch.float64), torch.float32)
        assert_keeps_the_same(actual.tolist(), expected, head)


def assert_keeps_the_same(actual: list[float], expected: list[float], head: brute_force.Head) -> None:
    """The kept tokens are the same, unless two scores are too close for float32 to tell them apart."""
    kept = brute_force.keep(actual, head.protected, head.ctx.quota)
    wanted = brute_force.keep(expected, head.protected, head.ctx.quota)
    swapped = [expected[token] for token in kept ^ wanted]
    close = TOLERANCES[torch.float32].absolute
    assert len(kept) == len(wanted) and (not swapped or max(swapped) - min(swapped) <= close)


def test_a_head_scores_as_it_would_alone(policy: Policy) -> None:
    """Places without a token change nothing."""
    if repr(policy) == "tova(per_head=False)":
        pytest.skip("TOVA averages over all heads of a layer")
    ctx = shown(random_context(SHAPES["capped"]), policy)
    scores = policy.score(ctx)
    for index, kv_head in brute_force.heads_of(ctx):
        alone = policy.score(contexts.head(ctx, index, kv_head))[0, 0]
        assert_near(scores[index, kv_head, : len(alone)], alone)


def test_a_row_scores_as_it_would_alone(policy: Policy) -> None:
    ctx = shown(random_context(SHAPES["ragged"]), policy)
    scores = policy.score(ctx)
    for index in range(len(scores)):
        assert ctx.held is not None
        held = ctx.held[index]
        assert_near(scores[index][held], policy.score(contexts.row(ctx, index))[0][held])


def test_the_same_context_gives_the_same_scores_and_stays_as_it_is(policy: Policy) -> None:
    ctx = shown(random_context(SHAPES["capped"]), policy)
    before = {name: value.clone() for name, value in vars(ctx).items() if isinstance(value, torch.Tensor)}
    first, second = policy.score(ctx), policy.score(ctx)
    assert ctx.held is not None and torch.equal(first[ctx.held], second[ctx.held])
    assert all(torch.equal(getattr(ctx, name), value) for name, value in before.items())


def test_working_block_by_block_changes_nothing(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = shown(random_context(SHAPES["ragged"]), policy)
    assert ctx.held is not None
    whole = policy.score(ctx)[ctx.held]
    monkeypatch.setattr(context, "_STRIP_ELEMENTS", 1500)
    monkeypatch.setattr(rkv, "_BLOCK_ELEMENTS", 500)
    monkeypatch.setattr(output_lengths, "_BLOCK_ELEMENTS", 500)
    assert_near(policy.score(ctx)[ctx.held], whole)


def test_query_positions_may_be_given_for_each_row(policy: Policy) -> None:
    ctx = shown(random_context(SHAPES["gaps"]), policy)
    if ctx.query_positions is None:
        return
    each = replace(ctx, query_positions=ctx.query_positions.expand(len(ctx.keys), -1))
    assert torch.equal(policy.score(each), policy.score(ctx))


@pytest.mark.parametrize("case", POLICIES)
def test_half_precision_weights_and_queries_are_taken(case: str) -> None:
    policy = build(case)
    ctx = shown(random_context(SHAPES["ratio 3"]), policy)
    half = replace(
        ctx,
        queries=None if ctx.queries is None else ctx.queries.bfloat16(),
        output_weight=None if ctx.output_weight is None else ctx.output_weight.bfloat16(),
    )
    rounded = replace(
        ctx,
        queries=None if half.queries is None else half.queries.float(),
        output_weight=None if half.output_weight is None else half.output_weight.float(),
    )
    assert_near(policy.score(half), policy.score(rounded))


def test_random_draws_alike_for_rows_and_apart_for_heads() -> None:
    ctx, policy = random_context(SHAPES["ratio 3"]), resolve("random")
    scores = policy.score(ctx)
    assert torch.equal(scores, policy.score(ctx))
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[:1], policy.score(contexts.row(ctx, 1)))
    assert not torch.equal(scores[:, 0], scores[:, 1])
    for changed in (replace(ctx, seed=1), replace(ctx, layer=2), replace(ctx, seen=41)):
        assert not torch.equal(scores, policy.score(changed))


def test_random_is_uniform() -> None:
    ctx = random_context(SHAPES["ratio 3"])
    scores = torch.cat([resolve("random").score(replace(ctx, seed=seed))[0].flatten() for seed in range(200)])
    # Of 16,000 draws, a tenth has a standard error of 0.24 %.
    shares = torch.histc(scores, 10, 0, 1) / len(scores)
    assert (shares - 0.1).abs().max() < 0.01


def test_lagkv_ignores_channels_that_are_constant_in_the_next_block() -> None:
    ctx = random_context(SHAPES["ratio 3"])
    keys = ctx.keys.clone()
    keys[..., 20:24, 3] = keys[..., 20:21, 3]
    policy = resolve("lagkv", lag=4, sinks=0, across=True)
    head = brute_force.Head(replace(ctx, keys=keys), 1, 1)
    expected = torch.tensor(brute_force.score(policy, head), dtype=torch.float64)
    assert_near(policy.score(replace(ctx, keys=keys))[1, 1], expected, torch.float32)


def test_rkv_keeps_the_newest_of_equal_keys() -> None:
    ctx = shown(random_context(SHAPES["ratio 3"]), resolve("rkv"))
    keys = ctx.keys.clone()
    same = torch.tensor([5, 11, 17, 23])
    keys[:, :, same] = keys[:, :, 5:6]
    scores = resolve("rkv", weight=0, threshold=0.99).score(replace(ctx, keys=keys))[:, :, same]
    assert (scores.argmax(-1) == len(same) - 1).all()


class Loud(Policy):
    """Gives places without a token the lowest score of all, which no one may look at."""

    def score(self, ctx: Context) -> torch.Tensor:
        assert ctx.held is not None
        return ctx.values[..., 0].masked_fill(~ctx.held, -1e6)


def test_critical_does_not_look_at_scores_of_places_without_a_token() -> None:
    ctx = random_context(SHAPES["ragged"])
    assert ctx.held is not None
    held = ctx.held[1, 1]
    alone = contexts.head(ctx, 1, 1)
    inside = critical.Critical(Loud(), first=0.0).score(ctx)[1, 1, held]
    assert_near(inside, critical.Critical(Loud(), first=0.0).score(replace(alone, held=held[held][None, None]))[0, 0])
