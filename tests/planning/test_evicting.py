"""Plans of caches that evict: what they hold after a real run, to the byte where arithmetic can know it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kvcache import HeavyHitterCache, KVCache, unbind
from hf_kvcache.eviction.registry import available
from hf_kvcache.integration.versions import with_cache
from hf_kvcache.layers.evicting import EvictingLayer
from hf_kvcache.planning import plan
from hf_kvcache.planning.caches import maker
from tests import families

BATCH, CONTEXT = 2, 300


def run(model: Any, name: str, tokens: int = CONTEXT) -> KVCache:
    """The cache of that name after a prompt of random tokens, compressed if it waits for that."""
    ids = torch.randint(3, 60, (BATCH, tokens), generator=torch.Generator().manual_seed(0))
    cache: Any = maker(name)(model.config)
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, **with_cache(model, cache))
            if isinstance(cache, HeavyHitterCache) and cache.policy.needs_replay:
                cache.compress(model, ids)
    finally:
        unbind(model.config.get_text_config(decoder=True))
    cache.integrity()
    return cache


def lucky(cache: KVCache, seen: int) -> int:
    """Bytes that pages save whose tokens were chosen and happen to stand side by side, by the kept positions alone."""
    saved = 0
    for layer in cache.layers:
        if not isinstance(layer, EvictingLayer):
            continue
        options, policy = layer.options, layer.eviction.policy
        kept = layer.kept_positions()
        newest = policy.recent(kept.shape[2])
        for head in kept.flatten(0, 1):
            tokens = head[head >= 0].tolist()
            if len(tokens) == seen:
                continue  # nothing was dropped, so nothing was chosen
            middle = tokens[options.sink_length : len(tokens) - options.tail_length]
            for start in range(0, len(middle), options.page_size):
                page = middle[start : start + options.page_size]
                chosen = len(page) > 1 and page[0] < seen - newest
                if chosen and page[-1] - page[0] == len(page) - 1:
                    saved += 8 * options.page_size
    return saved


@pytest.mark.parametrize("policy", [p for p in available() if p not in ("kvzip", "triattention")])
def test_every_policy(policy: str) -> None:
    """In tokens and as a share, with full precision and packed, head by head equally many."""
    model = families.build("llama")
    names = [f"{policy}:90", f"{policy}:0.6+4bits"]
    found = plan(model.config, CONTEXT, BATCH, names, torch.float32)
    assert [row.name for row in found.caches] == names, found.unknown
    for row in found.caches:
        cache = run(model, row.name)
        assert row.bytes == cache.memory().total + lucky(cache, CONTEXT), row.name
