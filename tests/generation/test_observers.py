"""Looking at a cache changes nothing: ``memory()``, ``repr``, ``state_dict()``, ``integrity()``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kvcache import KVCache
from hf_kvcache.layers.base import KVCacheLayer
from tests.families import build
from tests.generation.kinds import KINDS, decode, filled
from tests.running import forward, prompt, small_cache


def _look(cache: KVCache) -> None:
    repr(cache)
    repr(cache.layers)
    cache.memory()
    cache.state_dict()
    cache.integrity()


def _states(cache: KVCache) -> list[Any]:
    """What would differ if something had been stored, packed or copied."""
    found: list[Any] = []
    for layer in cache.own_layers:
        storage = layer.storage
        found.append((layer.version, layer._new, layer.prepared, storage, layer.rollback.unconfirmed))
        if storage is not None:
            found.append((storage.table.version, storage.dense.longest, storage.dense.keys.data_ptr()))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_between_two_passes(kind: str) -> None:
    """Also where the tokens of the latest update wait for other layers to read them (``shared keys``)."""
    model, cache = filled(kind)
    other = cache.fork()
    before = _states(cache)
    _look(cache)
    assert _states(cache) == before
    assert torch.equal(decode(model, cache), decode(model, other))


@pytest.mark.parametrize("codec", ["none", "rotated4"])
def test_between_an_update_and_its_attention(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask has not said yet which of the new tokens are padding: nothing may be stored for a look."""
    model, mask = build("llama"), torch.ones(2, 80, dtype=torch.long)
    mask[0, :9] = 0

    def run() -> torch.Tensor:
        cache, seen, logits = small_cache(model, codec), 0, []
        for ids in prompt(80, 2).split([60, *[1] * 20], 1):
            seen += ids.shape[1]
            logits.append(forward(model, ids, cache, attention_mask=mask[:, :seen]))
        return torch.cat(logits, 1)

    wanted = run()
    attended = KVCacheLayer.attend

    def looking(layer: KVCacheLayer, call: Any) -> torch.Tensor:
        pending, version = layer._new, layer.storage.table.version if layer.storage else None
        layer.flushed().check()
        layer.tensors()
        layer.progress()
        assert layer._new is pending and (layer.storage.table.version if layer.storage else None) == version
        return attended(layer, call)

    monkeypatch.setattr(KVCacheLayer, "attend", looking)
    assert torch.equal(run(), wanted)
