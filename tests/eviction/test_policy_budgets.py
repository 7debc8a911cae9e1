"""What policies make of their budgets: pyramids that are full, judges that can be compared, blocks that fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kvcache import HeavyHitterCache
from hf_kvcache.eviction import resolve
from hf_kvcache.layers.evicting import EvictingLayer
from tests import families
from tests.eviction import brute_force
from tests.eviction.contexts import Shape, random_context, shown
from tests.eviction.toys import Toy, states
from tests.running import generate, prompt

SIZES: dict[str, Any] = {"sink_length": 2, "tail_length": 4, "page_size": 8, "interval": 8}


@pytest.mark.parametrize("share", [0.3, 0.6, 0.75, 0.9])
def test_a_pyramid_holds_its_whole_budget(share: float) -> None:
    """Layers cannot hold more than the prompt; what the lower ones leave over the upper ones keep."""
    model = families.build("llama")
    cache = HeavyHitterCache(model.config, share, "pyramidkv", window=8, **SIZES)
    generate(model, prompt(100), cache, new=1)
    held = [
        (layer.kept_positions() >= 0).sum(-1)[0].tolist() for layer in cache.layers if isinstance(layer, EvictingLayer)
    ]
    assert sum(map(sum, held)) == round(share * 100) * sum(map(len, held))
    assert held[0][0] == min(100, held[0][0]) and held[0][0] > held[-1][0]


def test_a_pyramid_is_capped_above_and_below() -> None:
    policy = resolve("pyramidkv", beta=20, window=8)
    quotas = [policy.layer_quota(80, place, 5, 20, 100) for place in range(5)]
    assert quotas == [100, 90, 80, 70, 60]
    assert [policy.layer_quota(40, place, 3, 38, 1000) for place in range(3)] == [41, 40, 39]
    assert [policy.layer_quota(80, place, 3, 20, 60) for place in range(3)] == [80] * 3


def test_scissorhands_judges_by_shares() -> None:
    """A token that hardly any query overlooked stays, however many queries have judged it; streaming drops it."""
    given = states(120, seed=3)
    pivotal = torch.tensor([30, 31, 50, 70])
    direction = torch.nn.functional.normalize(given.query.mean(1)[0].mean(0), dim=0)
    given.key[:, :, pivotal] = 40 * direction
    given.query[:] += 2 * direction
    toy = Toy("scissorhands", budget=24, newest=4, window=400)
    toy(given)
    streaming = Toy("streaming", budget=24)
    streaming(given)
    for ours, newest in zip(toy.positions(), streaming.positions(), strict=True):
        assert set(pivotal.tolist()) <= set(ours) and not set(pivotal.tolist()) & set(newest)
        assert len(set(ours) & set(newest)) <= 18


@pytest.mark.parametrize("quota", [40, 60, 100])
def test_lagkv_judges_half_of_a_small_budget(quota: int) -> None:
    """Blocks are a quarter of what may be kept, so that the newest that are not judged leave half of it to others."""
    ctx = random_context(Shape(tokens=200, quota=quota, sinks=4, batch=1))
    policy = resolve("lagkv")
    scores = policy.score(shown(ctx, policy))
    not_judged = (scores == 1e6).sum(-1) - 4
    assert (not_judged < quota // 2).all()
    expected = torch.tensor(brute_force.score(policy, brute_force.Head(ctx, 0, 1)))
    torch.testing.assert_close(scores[0, 1], expected.float())


def test_lagkv_of_a_large_budget_has_the_papers_blocks() -> None:
    ctx = random_context(Shape(tokens=600, quota=520, sinks=4, batch=1))
    assert ((resolve("lagkv").score(ctx) == 1e6).sum(-1) == 600 - 3 * 128).all()


@pytest.mark.parametrize("policy", ["snapkv", "pyramidkv", "morphkv", "dropkv", "ada-snapkv", "critical-snapkv"])
def test_a_window_longer_than_the_budget_takes_a_quarter_of_it(policy: str) -> None:
    """The rest goes by the scores of the queries in that quarter, where streaming keeps the newest."""
    given = states(120, seed=3)
    toy, shorter = Toy(policy, budget=32, window=64), Toy(policy, budget=32, window=8)
    toy(given)
    shorter(given)
    assert toy.positions() == shorter.positions()
    for kept in toy.positions():
        assert set(range(112, 120)) <= set(kept)
        assert sum(at < 120 - 32 for at in kept) > 8, "no more than sinks and a few are older than what is newest"


def test_rkv_has_the_same_quarter() -> None:
    given = states(120, seed=3)
    kept = [Toy("rkv", budget=16, window=window) for window in (8, 4, 3)]
    for toy in kept:
        toy(given)
    assert kept[0].positions() == kept[1].positions() != kept[2].positions()
