"""Saving caches with pickle and torch.save."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch

from hf_kvcache import HeavyHitterCache
from tests import families
from tests.generation.kinds import KINDS, decode, filled
from tests.running import forward, prompt


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_cache_goes_on(kind: str) -> None:
    """An unpickled cache continues bit for bit, and the pickled cache is not changed."""
    model, cache = filled(kind)
    again = pickle.loads(pickle.dumps(cache))
    again.integrity()
    assert torch.equal(decode(model, again), decode(model, cache))


@pytest.mark.parametrize(("policy", "options"), [("expected", {}), ("streaming", {"reindex": True})])
def test_an_unpickled_prompt_is_evicted_by_its_positions(policy: str, options: dict[str, Any]) -> None:
    """Before the first token, when the model has not run with the new cache; unless weights of the model are needed."""
    model = families.build("llama")
    sizes = {"sink_length": 2, "tail_length": 4, "page_size": 8, "evict_prefill": "end"}
    cache = HeavyHitterCache(model.config, 28, policy, **sizes, **options)
    weighing = HeavyHitterCache(model.config, 28, "critical-snapkv", **sizes)
    for held in (cache, weighing):
        forward(model, prompt(60), held)
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(cache))))
    assert torch.equal(decode(model, again), decode(model, cache))
    with pytest.raises(
        ValueError, match=r"'critical' needs the attention module of layer 0.*unpickled.*compress\(\) before"
    ):
        forward(model, prompt(1), pickle.loads(pickle.dumps(weighing)))
    weighing.compress()
    assert torch.equal(decode(model, pickle.loads(pickle.dumps(weighing))), decode(model, weighing))


def test_a_fork_takes_only_its_own_pages_along() -> None:
    """The pickle of a fork has the pages of that fork only."""
    model, cache = filled("rotated4")
    fork = cache.fork()
    size = len(pickle.dumps(fork))
    decode(model, cache, 60)
    assert len(pickle.dumps(fork)) == size


def test_torch_save() -> None:
    """torch.save can save a filled cache."""
    model, cache = filled("snapkv")
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    assert torch.equal(decode(model, torch.load(file, weights_only=False)), decode(model, cache))
