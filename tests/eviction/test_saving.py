"""An evicting cache that was saved and loaded goes on as the one that was not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_kvcache import HeavyHitterCache, SlidingWindowCache
from tests.running import forward, left_padded, prompt

SIZES: dict[str, Any] = {"tail_length": 4, "page_size": 8, "interval": 8}


def make(model: PreTrainedModel, policy: str, **options: Any) -> HeavyHitterCache:
    if policy == "reindexed":
        return SlidingWindowCache(model.config, 24, 2, reindex=True, **SIZES)
    return HeavyHitterCache(model.config, 28, policy, sink_length=2, **{**SIZES, "bits": 4, **options})


def steps(model: PreTrainedModel, cache: HeavyHitterCache, batch: int, mask: torch.Tensor, count: int) -> torch.Tensor:
    """Logits of ``count`` further tokens."""
    out = []
    for number in range(count):
        mask = torch.cat([mask, torch.ones(batch, 1, dtype=mask.dtype)], 1)
        at = (mask.cumsum(-1) - 1)[:, -1:]
        out.append(forward(model, prompt(1, batch, seed=number), cache, attention_mask=mask, position_ids=at))
    return torch.cat(out, 1)


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "expected", "random", "reindexed"])
def test_goes_on_as_if_nothing_had_been(model: PreTrainedModel, policy: str) -> None:
    """Latest queries, accumulated attention, pins, padding, counters and moved sinks are all part of the state."""
    pin = {} if policy == "reindexed" else {"pin": (5, 8)}
    inputs = left_padded([prompt(40, seed=1), prompt(33, seed=2)])
    at = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    cache = make(model, policy, **pin)
    forward(model, inputs["input_ids"], cache, attention_mask=inputs["attention_mask"], position_ids=at)
    steps(model, cache, 2, inputs["attention_mask"], 11)
    state = {name: tensor.clone() for name, tensor in cache.state_dict().items()}
    loaded = make(model, policy, **pin)
    loaded.load_state_dict(state)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 11, dtype=torch.long)], 1)
    assert torch.equal(steps(model, cache, 2, mask, 20), steps(model, loaded, 2, mask, 20))
    for ours, theirs in zip(cache.own_layers, loaded.own_layers, strict=True):
        assert torch.equal(ours.kept_positions(), theirs.kept_positions())  # type: ignore[attr-defined]
    loaded.integrity()


def test_a_state_of_other_settings_is_refused(model: PreTrainedModel) -> None:
    cache = make(model, "snapkv")
    forward(model, prompt(40), cache)
    with pytest.raises(ValueError, match="eviction"):
        make(model, "tova").load_state_dict(cache.state_dict())


def test_a_prompt_that_waits_is_not_saved(model: PreTrainedModel) -> None:
    cache = make(model, "snapkv", evict_prefill="end")
    forward(model, prompt(40), cache)
    with pytest.raises(ValueError, match=r"compress\(\)"):
        cache.state_dict()
    cache.compress()
    assert cache.state_dict()


def test_memory_counts_what_is_remembered_of_queries(model: PreTrainedModel) -> None:
    parts = {}
    for policy in ("snapkv", "h2o", "random"):
        cache = make(model, policy)
        forward(model, prompt(40), cache)
        parts[policy] = cache.memory().parts["other"]
    assert parts["random"] == 0
    layers, heads, dim = 2, 4, 16
    assert parts["snapkv"] >= layers * 64 * heads * dim * 4 and parts["h2o"] > 0
