"""What an evicting cache holds."""

from __future__ import annotations

from hf_kvcache import KVCache
from hf_kvcache.layers.evicting import EvictingLayer


def kept(cache: KVCache) -> list[list[list[list[int]]]]:
    """Positions that each layer, sequence and head holds."""
    found = []
    for layer in cache.own_layers:
        assert isinstance(layer, EvictingLayer)
        held = layer.kept_positions().tolist()
        found.append([[[position for position in head if position >= 0] for head in row] for row in held])
    return found
