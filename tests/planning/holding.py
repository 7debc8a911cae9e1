"""What a cache really holds after a prompt, and what chance saves of it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from hf_kvcache import HeavyHitterCache, KVCache, SparseReadCache, bind, unbind
from hf_kvcache.cache.memory import layer_report
from hf_kvcache.integration.versions import with_cache
from hf_kvcache.layers.evicting import EvictingLayer

BATCH, CONTEXT = 2, 300
#: Models that take the new tokens out of all of them.
GIVEN_ALL = ("cpmant",)


def fill(model: Any, cache: Cache) -> Any:
    """Let a model give ``cache`` a prompt of random tokens, and compress it if it waits for that; returns it."""
    ids = torch.randint(3, 60, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, **with_cache(model, cache))
            if isinstance(cache, HeavyHitterCache) and cache.policy.waits:
                cache.compress(model, ids)
    finally:
        unbind(model.config.get_text_config(decoder=True))
    return cache


def step(model: Any, cache: Cache) -> Any:
    """Let a model give one more token to ``cache``; returns it."""
    config = model.config.get_text_config(decoder=True)
    tokens = CONTEXT + 1 if config.model_type in GIVEN_ALL else 1
    bind(config)
    try:
        with torch.no_grad():
            model(input_ids=torch.full((BATCH, tokens), 5), use_cache=True, **with_cache(model, cache))
    finally:
        unbind(config)
    return cache


def made_by_a_step(model: Any, cache: Cache) -> int:
    """Bytes of what a first step makes to choose by what it reads."""
    return step(model, cache).memory().parts["summaries"] if isinstance(cache, SparseReadCache) else 0


def held(cache: Cache) -> int:
    """Bytes that a cache holds."""
    if isinstance(cache, KVCache):
        return cache.memory().total
    return sum(sum(layer_report(layer).parts.values()) for layer in cache.layers)


def saved_by_chance(cache: Cache) -> int:
    """Bytes of positions that are not stored, since chosen tokens of a page happen to stand side by side.

    Derived from the kept positions alone, for heads that keep equally many tokens.
    """
    saved = 0
    for layer in cache.layers:
        if isinstance(layer, EvictingLayer):
            kept = layer.kept_positions()
            newest = layer.eviction.policy.recent(kept.shape[2])
            saved += sum(_saved(layer, head[head >= 0].tolist(), newest) for head in kept.flatten(0, 1))
    return saved


def _saved(layer: EvictingLayer, tokens: list[int], newest: int) -> int:
    options, saved = layer.options, 0
    if len(tokens) == CONTEXT:
        return 0  # nothing was dropped, so nothing was chosen
    packed = tokens[options.sink_length : len(tokens) - options.tail_length]
    for start in range(0, len(packed), options.page_size):
        page = packed[start : start + options.page_size]
        chosen = len(page) > 1 and page[0] < CONTEXT - newest
        saved += 8 * options.page_size * (chosen and page[-1] - page[0] == len(page) - 1)
    return saved
