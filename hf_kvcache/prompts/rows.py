"""Prompts of a batch one by one, and caches of single prompts as the cache of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_kvcache.cache.base import KVCache
from hf_kvcache.cache.files import whole_ids
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.batching import can_join, joined, taken_out
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.joining import compact

#: A stored cache is copied into a pool of its own if more than this share of its pool's pages is unused.
_UNUSED = 0.125


def prompts_of(input_ids: Any, attention_mask: Any = None) -> list[np.ndarray]:
    """The tokens ``[n]`` of each sequence of a batch, without padding.

    Args:
        input_ids: ``[B, T]`` or ``[T]``.
        attention_mask: ``[B, T]``, 0 for padding, which stands before the tokens; None if there is no padding.

    Raises:
        ValueError: if the ids are no whole numbers, there are none, or padding stands elsewhere.
    """
    ids = whole_ids(input_ids)
    if ids.ndim != 2 or not ids.size:
        raise ValueError(f"input_ids of shape {list(ids.shape)}; accepted: [B, T] or [T], with at least one token")
    if attention_mask is None:
        return list(ids)
    mask = torch.as_tensor(attention_mask, device="cpu").bool()
    mask = mask[None] if mask.dim() == 1 else mask
    if tuple(mask.shape) != ids.shape:
        raise ValueError(f"attention_mask of shape {list(mask.shape)}; accepted: {list(ids.shape)}")
    if (mask[:, :-1] & ~mask[:, 1:]).any() or not mask[:, -1].all():
        raise ValueError("attention_mask hides tokens behind others; accepted: padding on the left, none otherwise")
    return [row[keep] for row, keep in zip(ids, mask.numpy(), strict=True)]


def width_of(input_ids: Any) -> int:
    """Columns of ``input_ids``, padding included."""
    return int(torch.as_tensor(input_ids, device="cpu").shape[-1])


def joinable(cache: KVCache) -> bool:
    """Whether caches of this kind can be put together to a batch, and taken apart."""
    return all(can_join(layer) for layer in cache.layers)


def padding_of(cache: KVCache, row: int) -> np.ndarray:
    """The positions of the padding of one sequence, ascending, as the layers of a cache say."""
    layer = next((x for x in cache.own_layers if isinstance(x, KVCacheLayer) and x.is_initialized), None)
    if layer is None:
        return np.zeros(0, np.int64)
    padding = layer.flushed().padding
    return padding.positions[padding.rows == row]


def join(empty: KVCache, caches: Sequence[KVCache], lengths: Sequence[int], total: int) -> KVCache:
    """The cache of a batch, whose sequences end at the same position, behind padding.

    Args:
        empty: an empty cache, which receives the layers.
        caches: caches of one sequence each.
        lengths: the tokens that they have seen.
        total: columns of the batch, the padding included.
    """
    empty.layers = [
        joined([cache.layers[index] for cache in caches], lengths, total) for index in range(len(empty.layers))
    ]
    return empty


def take_out(cache: KVCache, row: int) -> KVCache:
    """A cache of one sequence of a batch, without its padding; see :func:`joinable`."""
    other = cache.fork()
    other.layers = [taken_out(layer, row) for layer in cache.layers]
    return other


def to_keep(cache: KVCache) -> KVCache:
    """A fork of a cache for a store, without room for more tokens, and without a pool that is not well filled."""
    fork = cache.fork()
    for layer in fork.own_layers:
        storage = layer.storage
        if not isinstance(layer, KVCacheLayer) or not isinstance(storage, PagedStorage):
            continue
        storage.dense.shrink(storage.dense.longest)
        if storage.pool.free_pages > _UNUSED * storage.pool.held_pages:
            layer.storage = compact(storage)
    return fork
