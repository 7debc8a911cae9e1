"""Evicting on demand, and by a second reading of the context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hf_kvcache.cache.replay import evict_by_replay, replay
from hf_kvcache.layers.evicting import EvictingLayer

if TYPE_CHECKING:
    from hf_kvcache.cache.base import KVCache


def compress(
    cache: KVCache,
    model: Any,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    prompt_ids: torch.Tensor | None,
    replayed: list[torch.Tensor] | None,
) -> None:
    """Evict every layer down to its budget; see :meth:`hf_kvcache.KVCache.compress`."""
    layers = [layer for layer in cache.layers if isinstance(layer, EvictingLayer)]
    if not layers:
        raise ValueError("compress(): this cache keeps every token; accepted: caches with a budget")
    policy = layers[0].eviction.policy
    if not policy.needs_replay:
        for layer in layers:
            layer.compress()
        return
    if replayed is None:
        if model is None or input_ids is None:
            raise ValueError(f"compress(): policy {policy.name!r} reads the context again; give model and input_ids")
        replayed = replay(cache, model, input_ids, attention_mask, prompt_ids)
    evict_by_replay(cache, replayed)
