"""New values for kept tokens, inside a cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from hf_kvcache import HeavyHitterCache
from hf_kvcache.eviction.base import ALL_QUERIES
from hf_kvcache.eviction.observations import Observations
from hf_kvcache.storage.token_view import TokenView
from tests.eviction.toys import SINKS, TAIL, Toy, states
from tests.generation.layers import States


def values_held(toy: Toy) -> torch.Tensor:
    storage = toy.layer.storage
    assert storage is not None
    return TokenView.of(storage, np.zeros(1, np.int64)).states("values")


@pytest.mark.parametrize("policy", ["random", "snapkv", "knorm"])
def test_output_for_the_latest_queries_comes_nearer(policy: str) -> None:
    """Attention of the observed queries over what is kept, against that over all, with and without new values."""
    given = states(120, ratio=1)
    errors = {}
    for count in (0, 32):
        toy = Toy(policy, "none", 1, compensate=count)
        toy(given)
        kept = toy.layer.kept_positions()[0]
        errors[count] = error(given, kept, values_held(toy)[0], 32)
    assert errors[32] < 0.95 * errors[0]


@pytest.mark.parametrize("wanted", [0, 8, ALL_QUERIES])
def test_as_many_queries_are_fitted_to_as_are_asked_for(wanted: int) -> None:
    """However many a policy wants, and however short the latest update was."""
    rows, query = np.arange(2), torch.randn(2, 3, 125, 4, generator=torch.Generator().manual_seed(0))
    seen = Observations(wanted, fitted=100)
    for start, stop in ((0, 90), *((at, at + 1) for at in range(90, 120)), (120, 125)):
        if stop == 125 and wanted:
            latest = seen.latest_queries(rows, wanted)
            assert latest is not None and torch.equal(latest[0], query[:, :, :120][:, :, -8 if wanted == 8 else -64 :])
        seen.see(query[:, :, start:stop], start, None, drafted=False)
    fitted = seen.latest_queries(rows, 100)
    assert fitted is not None and torch.equal(fitted[0], query[:, :, 25:])
    assert fitted[1].tolist() == [list(range(25, 125))] * 2
    if wanted == ALL_QUERIES:
        update = seen.latest_queries(rows, wanted)
        assert update is not None and torch.equal(update[0], query[:, :, 120:])


def error(given: States, kept: torch.Tensor, values: torch.Tensor, count: int) -> float:
    """Squared distance of the outputs of the last ``count`` queries, in float64, written out."""
    total = 0.0
    length = given.length
    for head in range(given.key.shape[1]):
        keys, all_values = given.key[0, head].double(), given.value[0, head].double()
        places = kept[head][kept[head] >= 0]
        for at in range(length - count, length):
            query = given.query[0, head, at].double() * keys.shape[1] ** -0.5
            full = (keys[: at + 1] @ query).softmax(0) @ all_values[: at + 1]
            seen = places <= at
            ours = (keys[places[seen]] @ query).softmax(0) @ values[head, : len(places)][seen].double()
            total += float((ours - full).square().sum())
    return total


def test_sinks_tail_and_packed_values_stay() -> None:
    """Only tokens that are about to be packed get new values; which tokens stay, keys alone say here."""
    given = states(120, ratio=1)
    with_new, without = (Toy("knorm", "none", 1, compensate=count) for count in (32, 0))
    for toy in (with_new, without):
        toy(given.at(0, 100))
    packed = values_held(with_new)
    assert with_new.positions() == without.positions()
    changed = (packed != values_held(without)).any(-1)[0]
    assert changed.any(-1).all() and not changed[:, :SINKS].any() and not changed[:, -TAIL:].any()
    before = [dict(zip(at, packed[0, head], strict=False)) for head, at in enumerate(with_new.positions())]
    with_new(given.at(100, 120))  # evicts again, with what is packed beside what is new
    after = values_held(with_new)[0]
    for head, positions in enumerate(with_new.positions()):
        kept = [at for at in positions if at < 100 - TAIL]
        assert kept and all(torch.equal(after[head, positions.index(at)], before[head][at]) for at in kept)


def test_replay_policies_refuse_it(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="compensate"):
        HeavyHitterCache(model.config, 64, "kvzip", compensate=8)
