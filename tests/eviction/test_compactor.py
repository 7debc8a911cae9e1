"""Compactor against its two parts in float64, a chunk and a token at a time; and KVzip's product."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hf_kvcache.eviction import Context, resolve
from tests.eviction.brute_force import Head, heads_of
from tests.eviction.contexts import KEY_DIM, SHAPES, random_context
from tests.eviction.rope_contexts import CASES, biased, rotary_context, rotation
from tests.tolerances import Tolerance, assert_near, assert_within

#: The leverage of ``T`` tokens is off by ``T`` times the rounding of keys that were un-rotated in float32.
TOLERANCE = Tolerance(1e-3, 2e-3)
OPTIONS: list[dict[str, Any]] = [
    {"exact": True},
    {"sketch": 5, "chunk": 7, "kernel": 1, "weight": 0.35},
    {"sketch": 3, "chunk": 1, "scaled": False, "weight": 2},
]


@pytest.mark.parametrize(("shape", "family"), CASES)
@pytest.mark.parametrize("options", OPTIONS)
def test_scores_equal_the_brute_force(shape: str, family: str, options: dict[str, Any]) -> None:
    policy = resolve("compactor", **options)
    ctx = rotary_context(shape, family, policy)
    ctx = biased(ctx) if "chunk" in options else ctx
    scores = policy.score(ctx)
    assert scores.shape == ctx.positions.shape and scores.isfinite().all()
    if min(sum(free_of(Head(ctx, *place))) for place in heads_of(ctx)) < 2 * KEY_DIM:
        return  # fewer tokens than dimensions: the leverage is 1 for all but for how the inverse is made to exist
    for index in range(ctx.keys.shape[0]):
        for kv_head, expected in enumerate(brute_force(policy, ctx, index, family)):
            free = free_of(Head(ctx, index, kv_head))
            assert_within(scores[index, kv_head, : len(free)][free], torch.from_numpy(expected[free]), TOLERANCE)


def free_of(head: Head) -> np.ndarray:
    """bool ``[count]``, the tokens whose scores are looked at."""
    return ~np.array(head.protected, bool)


def brute_force(policy: Any, ctx: Context, index: int, family: str) -> list[np.ndarray]:
    """The scores of all heads of a sequence: what is standardized is standardized over all of them.

    Those of protected tokens are NaN.
    """
    heads = [Head(ctx, i, kv_head) for i, kv_head in heads_of(ctx) if i == index]
    leverage = [np.full(head.count, np.nan) for head in heads]
    for all_of_head, head, part in zip(
        leverage, heads, standard([leverages(policy, head, family) for head in heads]), strict=True
    ):
        all_of_head[free_of(head)] = part
    received = [attention(policy, head) for head in heads]
    known = [~np.isnan(part) for part in received]
    observed = standard([part[where] for part, where in zip(received, known, strict=True)])
    weight = policy.weight
    if weight is None:
        weight = max(0.0, 1 - ctx.quota / np.mean([head.count for head in heads]))
    scores = []
    for lever, part, where in zip(leverage, observed, known, strict=True):
        score = (1 + weight**2) ** 0.5 * lever
        score[where] = part + weight * lever[where]
        scores.append(score)
    return scores


def leverages(policy: Any, head: Head, family: str) -> np.ndarray:
    """Of the tokens that are not protected."""
    keys = np.array([rotation(family, at).T @ key for at, key in zip(head.positions, head.keys, strict=True)])
    keys = keys[free_of(head)]
    keys = keys - keys.mean(0)
    if not policy.exact and policy.sketch < KEY_DIM:
        generator = head.ctx.generator()
        keys = keys @ torch.randn(KEY_DIM, policy.sketch, generator=generator).double().numpy()
    return np.diag(keys @ np.linalg.pinv(keys.T @ keys) @ keys.T)


def attention(policy: Any, head: Head) -> np.ndarray:
    """NaN for tokens whose query is not there, or that are protected."""
    received = np.full(head.count, np.nan)
    scale = head.ctx.scoring.scaling if policy.scaled else 1.0
    cap = head.ctx.scoring.softcap if policy.scaled else None
    for start in range(0, len(head.at), policy.chunk):
        chunk = head.at[start : start + policy.chunk]
        tokens = [head.positions.index(at) for at in chunk if at in head.positions]
        tokens = [token for token in tokens if not head.protected[token]]
        received[tokens] = 0.0
        for q in range(head.group):
            for query in range(start, start + len(chunk)):
                scores = head.keys[tokens] @ head.queries[q, query] * scale
                scores = cap * np.tanh(scores / cap) if cap else scores
                scores = scores + head.bias[tokens]
                weights = np.exp(scores - scores.max()) if tokens else scores
                received[tokens] += weights / weights.sum() / head.group
    received *= np.linalg.norm(head.values, axis=1)
    reach = range(-(policy.kernel // 2), policy.kernel // 2 + 1)
    pooled = received.copy()
    for token in np.flatnonzero(~np.isnan(received)):
        near = [received[token + step] for step in reach if 0 <= token + step < head.count]
        pooled[token] = np.nanmean(near)
    return pooled


def standard(parts: list[np.ndarray]) -> list[np.ndarray]:
    together = np.concatenate(parts)
    if not len(together):
        return parts
    deviation = max(together.std(), 1e-3 * abs(together.mean()), np.finfo(np.float32).tiny)
    return [(part - together.mean()) / deviation for part in parts]


def test_leverage_is_that_of_the_keys_before_rotating() -> None:
    policy: Any = resolve("compactor", exact=True)
    ctx = rotary_context("ratio 3", "llama", policy)
    assert ctx.rope is not None
    moved = ctx.rope.rotate(ctx.rope.unrotate(ctx.keys, ctx.positions), ctx.positions + 1000)
    elsewhere = replace(ctx, keys=moved, positions=ctx.positions + 1000)
    held = torch.ones_like(ctx.protected)
    assert_within(policy._leverage(elsewhere, held), policy._leverage(ctx, held), TOLERANCE)
    assert_within(policy._leverage(ctx, held).sum(-1), torch.full((2, 2), float(KEY_DIM)), TOLERANCE)


def test_the_sketch_is_drawn_anew_for_each_layer_but_not_for_each_call() -> None:
    policy = resolve("compactor", sketch=4)
    ctx = rotary_context("ratio 3", "llama", policy)
    assert torch.equal(policy.score(ctx), policy.score(ctx))
    assert not torch.equal(policy.score(ctx), policy.score(replace(ctx, layer=2)))


def test_a_sequence_of_a_batch_is_scored_as_alone() -> None:
    policy = resolve("compactor", sketch=4, chunk=8)
    ctx = rotary_context("ragged", "llama", policy)
    assert ctx.held is not None and ctx.queries is not None
    alone = replace(
        ctx,
        **{name: getattr(ctx, name)[1:] for name in ("keys", "values", "positions", "held", "protected", "queries")},
    )
    assert_near(policy.score(alone)[0], policy.score(ctx)[1])


def test_a_sink_that_draws_all_attention_changes_no_score() -> None:
    policy = resolve("compactor", exact=True)
    ctx = rotary_context("ratio 3", "llama", policy)
    ctx.protected[:, :, 0] = True
    assert ctx.rope is not None
    loud = replace(ctx, keys=ctx.keys.clone(), values=ctx.values.clone())
    loud.keys[:, :, 0] *= 50
    loud.values[:, :, 0] *= 50
    free = ~ctx.protected
    assert torch.equal(policy.score(loud)[free], policy.score(ctx)[free])


def test_equal_keys_have_equal_leverage() -> None:
    policy: Any = resolve("compactor", exact=True)
    ctx = rotary_context("ratio 3", "llama", policy)
    scores = policy.score(replace(ctx, keys=torch.zeros_like(ctx.keys)))
    assert scores.isfinite().all()


@pytest.mark.parametrize(
    ("option", "value"), [("chunk", 0), ("kernel", 2), ("sketch", 0), ("weight", -1), ("exact", 1)]
)
def test_bad_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option}={value!r}; accepted: "):
        resolve("compactor", **{option: value})


def test_kvzip_is_what_the_replay_looked_at() -> None:
    policy = resolve("kvzip")
    replayed = torch.rand(2, 2, 7)
    assert policy.needs_replay and not policy.needs_output
    assert policy.score(replace(random_context(SHAPES["ragged"]), replayed=replayed)) is replayed


def test_kvzipplus_weighs_each_head_by_its_projection() -> None:
    policy, plain = resolve("kvzipplus"), random_context(SHAPES["ragged, ratio 8"])
    batch, heads, tokens = plain.positions.shape
    replayed = torch.rand(batch, heads, 8, tokens, generator=torch.Generator().manual_seed(0))
    ctx = replace(plain, replayed=replayed)
    scores = policy.score(ctx)
    assert ctx.output_weight is not None and policy.needs_output and policy.needs_replay
    for index, kv_head in heads_of(ctx):
        for token, value in enumerate(Head(ctx, index, kv_head).values):
            blocks = ctx.output_weight.double().numpy().reshape(ctx.output_weight.shape[0], -1, len(value))
            expected = max(
                float(replayed[index, kv_head, q, token]) * math.dist(blocks[:, kv_head * 8 + q] @ value, [0] * 12)
                for q in range(8)
            )
            assert_near(scores[index, kv_head, token], torch.tensor(expected), torch.float32)
