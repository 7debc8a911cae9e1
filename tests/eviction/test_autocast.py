"""Under autocast tokens are chosen in full precision, as without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kvcache import HeavyHitterCache
from hf_kvcache.cache import watch
from tests import families
from tests.eviction.toys import Toy, states
from tests.running import forward, prompt


@pytest.mark.parametrize("policy", ["compactor", "gate"])
def test_the_same_tokens_stay(policy: str) -> None:
    given, kept, beside = states(100), [], []
    for enabled in (False, True):
        toy = Toy(policy, "rotated8")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            toy.run(given, [60, 84])
        kept.append(toy.positions())
        assert toy.layer.evictor is not None
        beside.append(toy.layer.evictor.tensors())
    assert kept[0] == kept[1]
    assert all(map(torch.equal, *beside))


@pytest.mark.parametrize("policy", ["kvzipplus", "rms"])
def test_a_second_reading_finds_probabilities_in_full_precision(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same queries and keys, which the model itself rounds."""
    model, ids, seen = families.build("llama"), prompt(40), []
    record = watch._record

    def checked(found: torch.Tensor, *arguments: Any) -> None:
        mine = found.clone()
        record(found, *arguments)
        with torch.autocast("cpu", enabled=False):
            record(mine, *arguments)
        seen.append(torch.equal(found, mine))

    monkeypatch.setattr(watch, "_record", checked)
    cache = HeavyHitterCache(model.config, 16, policy, sink_length=2, tail_length=4, page_size=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        forward(model, ids, cache)
        cache.compress(model, ids)
    assert seen and all(seen)
