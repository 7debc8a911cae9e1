"""Stores over tiny models, and what is held in them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from hf_kvcache import KVCache
from hf_kvcache.prompts import PromptStore
from tests.running import forward, prompt, small_cache

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def some(names: list[str], *fast: str) -> list[Any]:
    """Names for parametrization; all but the ``fast`` ones are slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def store_of(model: PreTrainedModel, codec: str = "rotated4", memory: Any = "50 MiB", **options: Any) -> PromptStore:
    return PromptStore(lambda: small_cache(model, codec), memory, model=model, **options)


def read(model: PreTrainedModel, ids: torch.Tensor, codec: str = "rotated4") -> KVCache:
    """A cache that has read ``ids``."""
    cache = small_cache(model, codec)
    forward(model, ids, cache)
    return cache


def variant(length: int, shared: int, seed: int) -> torch.Tensor:
    """A prompt that begins like all others of any length, for ``shared`` tokens."""
    start = prompt(400)[:, :shared]
    return torch.cat([start, prompt(length, seed=seed)[:, : length - shared]], 1)


def allocated(caches: list[KVCache]) -> int:
    """Bytes of all tensors and arrays of caches, counted one by one, each once."""
    found: dict[int, int] = {}
    for cache in caches:
        for layer in cache.own_layers:
            storage = layer.storage
            if storage is None:
                continue
            dense, table, mean = storage.dense, storage.table, storage.key_mean
            for slab in storage.pool.slabs():
                found[slab.data_ptr()] = slab.numel()
            for x in (dense.keys, dense.values, *([] if mean is None else [mean])):
                found[x.data_ptr()] = x.numel() * x.element_size()
            arrays = (dense.positions, dense.lengths, table.lengths, table._ids, table._addresses)
            for array in (*arrays, table._counts, table._first):
                found[id(array)] = array.nbytes
            for tensor in layer.own_tensors():
                found[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(found.values())


def held(store: PromptStore) -> list[KVCache]:
    """The caches that a store holds in memory."""
    return [entry.cache for entry in store._shelf.entries() if entry.cache is not None]


def stored_tokens(store: PromptStore) -> set[tuple[int, ...]]:
    return {tuple(entry.ids.tolist()) for entry in store._shelf.entries()}


def ids_of(tokens: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.array([tokens]))
