"""A threshold in front of a policy: what scores too little goes, whatever the budget has room for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kvcache import HeavyHitterCache
from hf_kvcache.planning import plan
from hf_kvcache.planning.caches import maker
from tests import families
from tests.eviction.toys import HEADS, INTERVAL, SINKS, TAIL, Toy, states
from tests.generation.layers import States
from tests.planning.holding import BATCH, CONTEXT, fill, held
from tests.running import forward, prompt

PROMPT, MORE = 80, 24
LONGEST = 4.2


def expected(given: States, seen: int, candidates: list[list[int]], budget: int) -> list[list[int]]:
    """Of the candidates of each head the sinks, the tail, and up to the budget the shortest keys below ``LONGEST``."""
    kept = []
    for head, positions in enumerate(candidates):
        always = [at for at in positions if at < SINKS or at >= seen - TAIL]
        lengths = given.key[0, head].double().square().sum(-1).sqrt()
        short = sorted(
            (at for at in positions if at not in always and lengths[at] < LONGEST), key=lambda at: lengths[at]
        )
        kept.append(sorted(always + short[: budget - len(always)]))
    return kept


@pytest.mark.parametrize("budget", [20, 1000])
def test_prompt_and_decoding(budget: int) -> None:
    """With room for every token and without; each head keeps its own number."""
    toy, given = Toy("threshold-knorm", tau=-LONGEST, budget=budget), states(PROMPT + MORE)
    toy(given.at(0, PROMPT))
    kept = expected(given, PROMPT, [list(range(PROMPT))] * HEADS, budget)
    assert toy.positions() == kept
    assert budget == 20 or len({*map(len, kept)}) == HEADS
    for seen in range(PROMPT + 1, PROMPT + MORE + 1):
        toy(given.at(seen - 1, seen))
        kept = [[*head, seen - 1] for head in kept]
        if (seen - PROMPT) % INTERVAL == 0:
            kept = expected(given, seen, kept, budget)
        assert toy.positions() == kept
    toy.cache.integrity()


def test_heads_that_compete_keep_their_budget_at_most() -> None:
    toy, given = Toy("ada-threshold-knorm", tau=-LONGEST, budget=20, floor=0.0), states(PROMPT)
    toy(given)
    free = expected(given, PROMPT, [list(range(PROMPT))] * HEADS, PROMPT)
    kept = toy.positions()
    assert sum(map(len, kept)) == min(20 * HEADS, sum(map(len, free)))
    assert all(set(mine) <= set(all_short) for mine, all_short in zip(kept, free, strict=True))


def test_where_nothing_scores_too_little_nothing_was_evicted() -> None:
    """So the cache can go back to before that choice."""
    toy = Toy("threshold-knorm", tau=-1e30, budget=1000)
    toy(states(PROMPT))
    assert toy.layer.evictor is not None and toy.layer.evictor.evictions == 0
    toy.cache.crop(-PROMPT // 2)
    assert toy.positions() == [list(range(PROMPT // 2))] * HEADS


def test_second_reading() -> None:
    """Every head of every layer keeps what was looked at enough."""
    model, ids, tau = families.build("llama"), prompt(60), 0.08
    cache = HeavyHitterCache(model.config, 60, "threshold-kvzip", tau=tau, sink_length=2, tail_length=4)
    forward(model, ids, cache)
    replayed = cache.replay(model, ids)
    cache.compress(replayed=replayed)
    protected = (torch.arange(60) < 2) | (torch.arange(60) >= 56)
    counts = set()
    for layer, largest in zip(cache.layers, replayed, strict=True):
        for head, stays in zip(layer.kept_positions()[0], (largest[0] > tau) | protected, strict=True):
            assert head[head >= 0].tolist() == stays.nonzero().flatten().tolist()
            counts.add(int(stays.sum()))
    assert len(counts) > 1 and min(counts) > 6 and max(counts) < 60


@pytest.mark.parametrize(
    "name",
    ["threshold-snapkv:1k"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("threshold-snapkv:90", "threshold-ada-dropkv:70")],
)
def test_plans_are_upper_bounds(name: str) -> None:
    model = families.build("llama")
    (row,) = plan(model.config, CONTEXT, BATCH, [name], torch.float32).caches
    cache: Any = fill(model, maker(name)(model.config))
    assert "at most" in row.note and held(cache) <= row.bytes <= row.peak
