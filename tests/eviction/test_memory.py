"""What an evicting cache holds at most: while a long prompt comes in chunks, and while it generates without end."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from hf_kvcache import HeavyHitterCache
from hf_kvcache.eviction import available, resolve
from hf_kvcache.eviction.evictor import Evictor
from tests.eviction.toys import HEADS, Toy, states
from tests.running import forward, prompt

LENGTH, BUDGET, CHUNK = 4096, 512, 512


class Peak(TorchDispatchMode):
    """Bytes of all tensor storages that were made while it is on and still live, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


@contextmanager
def peak() -> Iterator[Peak]:
    gc.collect()
    with Peak() as counted:
        yield counted


@pytest.mark.parametrize(
    "policy",
    [
        name if name in ("snapkv", "knorm") else pytest.param(name, marks=pytest.mark.slow)
        for name in available()
        if name not in ("keepall", "gate") and not resolve(name).waits
    ],
)
def test_prefill_in_chunks(policy: str) -> None:
    """4,096 tokens at a budget of 512 in chunks of 512 never hold a third of the full cache's bytes."""
    toy = Toy(policy, budget=BUDGET, page_size=64, tail_length=32, interval=128)
    full = 2 * HEADS * LENGTH * 16 * 4
    for start in range(0, LENGTH, CHUNK):
        toy(states(CHUNK, seed=start))
        report = toy.cache.memory()
        assert report.total < full / 3
        assert all(len(head) == BUDGET for head in toy.positions())
    assert report.full_same_dtype == full


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["snapkv", "knorm", "h2o"])
def test_peak_of_a_model(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in a model of eight layers, with all that an eviction makes in between."""
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config).eval()
    cache, evict, made = HeavyHitterCache(config, BUDGET, policy), Evictor.evict, [0]

    def counted(*arguments: Any) -> None:
        with peak() as count:
            evict(*arguments)
        made.append(count.peak)

    monkeypatch.setattr(Evictor, "evict", counted)
    held, full, chunk = 0, 8 * 2 * 2 * LENGTH * 32 * 4, 2 * 2 * CHUNK * 32 * 4
    for part in prompt(LENGTH).split(CHUNK, 1):
        forward(model, part, cache)
        held = max(held, cache.memory().total)
    assert cache.memory().full_same_dtype == full and len(made) == 1 + 8 * LENGTH // CHUNK
    # A layer evicts before the next one takes its part of the chunk in.
    assert held + chunk + max(made) < full / 3


@pytest.mark.parametrize("codec", ["none", "turboquant4"])
def test_flushed_bytes_do_not_grow(codec: str) -> None:
    """A window's bytes after every interval stay within what they were when it was first full."""
    _window(850, codec)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["none", "turboquant4"])
def test_flushed_bytes_do_not_grow_in_20000_tokens(codec: str) -> None:
    _window(20000, codec)


def _window(length: int, codec: str) -> None:
    toy, given = Toy("streaming", codec, interval=16), states(256)
    sizes = []
    for at in range(length):
        toy(given.at(at % 256, at % 256 + 1))
        if at % 16 == 5:
            sizes.append(toy.cache.memory().total)
    # Pages are merged where that saves one, so that bytes go up and down, within the same bounds.
    assert set(sizes[-20:]) == set(sizes[10:30])
    layer = toy.layer
    assert layer.storage is not None and layer.evictor is not None
    bookkeeping = len(layer.storage.pool.positions), layer.evictor.pinned.mask.shape, layer.storage.pool.held_pages
    assert bookkeeping[0] <= layer.storage.pool.held_pages and bookkeeping[2] <= 64 and bookkeeping[1][1] == 0
    assert toy.cache.get_seq_length() == length
