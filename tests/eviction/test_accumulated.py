"""Accumulated attention: that of a prompt, and how it goes with its keys when others are dropped."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_kvcache.eviction import prompt_sums
from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.storage.token_view import TokenView
from tests.eviction.toys import HEADS, PAGE, Toy, states

LENGTH = 60


def accumulated(toy: Toy) -> list[dict[int, float]]:
    """By head, what each key has received so far, by the key's position."""
    storage, evictor = toy.layer.storage, toy.layer.evictor
    assert storage is not None and evictor is not None and evictor.observations.accumulated is not None
    held = TokenView.of(storage, np.array([0]))
    found = evictor.observations.accumulated.by_token(held)[0]
    return [
        {int(at): float(x) for at, x, real in zip(positions, of_head, exists, strict=True) if real}
        for positions, of_head, exists in zip(held.positions[0], found, held.exists[0], strict=True)
    ]


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_sums_stay_with_their_keys(codec: str) -> None:
    """Right after an eviction and after another; tokens move between pages, or only within them."""
    toy = Toy("h2o", codec, budget=30, interval=None, evict_prefill=None)
    toy(states(LENGTH))
    for _ in range(2):
        before = accumulated(toy)
        toy.cache.compress()
        after = accumulated(toy)
        for kept, all_of_them in zip(after, before, strict=True):
            assert 0 < len(kept) < len(all_of_them)
            assert kept == {at: all_of_them[at] for at in kept}
        toy(states(3 * PAGE, seed=1))


def test_looking_at_sums_changes_nothing() -> None:
    """A look at the sums of all tokens, for some of which nothing was added yet, makes no room for them."""
    toy = Toy("h2o", budget=30, interval=None, evict_prefill=None)
    toy(states(LENGTH))
    toy.cache.compress()
    storage, evictor = toy.layer.storage, toy.layer.evictor
    assert storage is not None and evictor is not None and evictor.observations.accumulated is not None
    held, accumulated = TokenView.of(storage, np.array([0])), evictor.observations.accumulated
    before = accumulated.by_token(held)
    accumulated.trim(3, PAGE)
    shapes = [tensor.shape for tensor in evictor.tensors()]
    fewer = accumulated.by_token(held)
    assert [tensor.shape for tensor in evictor.tensors()] == shapes
    assert fewer.shape == before.shape and (fewer == before)[fewer > 0].all() and (fewer == 0).any()


SCORINGS = [Scoring(0.3), Scoring(0.3, softcap=1.5), Scoring(0.3, sink_logits=torch.tensor([-1.0, 0.0, 2.0, 4.0]))]


@pytest.mark.parametrize("scoring", SCORINGS, ids=["plain", "softcap", "sinks"])
@pytest.mark.parametrize("passes", [1, 2])
def test_sums_of_a_prompt(passes: int, scoring: Scoring, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass over strips, or two passes where a device has a kernel for the second, against float64."""
    if passes == 2:
        kernel = SimpleNamespace(supports=lambda *_: True)
        monkeypatch.setattr(prompt_sums, "implementation", lambda op, device: kernel if op == "column_sums" else None)
    given = states(70, ratio=2)
    found = prompt_sums.prompt_sums(given.query, given.key, scoring)
    scores = (given.query.unflatten(1, (HEADS, 2)) @ given.key[:, :, None].mT).double() * scoring.scaling
    if scoring.softcap is not None:
        scores = scoring.softcap * (scores / scoring.softcap).tanh()
    weights = scores.masked_fill(torch.ones(70, 70).triu(1).bool(), -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if scoring.sink_logits is not None:
        total = total + scoring.sink_logits.double().exp().view(1, HEADS, 2, 1, 1)
    torch.testing.assert_close(found.double(), (weights / total).sum(-2).mean(2), rtol=1e-4, atol=1e-5)
