"""Layers of one sequence each as a layer of a batch, and a sequence of a batch as a layer of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_kvcache.kernels.padding import NO_PADDING, padding_places
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.cross_attention import CrossAttentionLayer
from hf_kvcache.layers.evicting_attention import EvictingAttention
from hf_kvcache.layers.indexed import IndexedLayer
from hf_kvcache.layers.mla import IndexedLatentLayer
from hf_kvcache.layers.rollback import RollbackWindow
from hf_kvcache.lowrank.pre_rope_storage import PreRopeStorage
from hf_kvcache.storage.joining import join, take_out


def can_join(layer: Any) -> bool:
    """Whether :func:`joined` and :func:`taken_out` know the state of a layer.

    What a sliding window shows depends on the padding between tokens, and what was evicted or summed up has states of
    other kinds.
    """
    others = CrossAttentionLayer, EvictingAttention, IndexedLatentLayer, IndexedLayer
    return isinstance(layer, KVCacheLayer) and layer.sliding_window is None and not isinstance(layer, others)


def joined(layers: Sequence[Any], lengths: Sequence[int], total: int) -> Any:
    """A layer of a batch, whose sequences end at the same position.

    Args:
        layers: layers of one sequence each without padding, which see as many tokens as ``lengths`` says, or 0.
        lengths: tokens of each sequence.
        total: tokens that the batch has seen: the sequences stand behind padding.
    """
    like = next(layer for layer, length in zip(layers, lengths, strict=True) if length == max(lengths))
    other = like.fork()
    if like.storage is None:  # it reads what another layer holds
        return other
    shifts = [total - length for length in lengths]
    storages = []
    for layer, length in zip(layers, lengths, strict=True):
        storage = (layer.flushed() if length else like.flushed()).storage
        if not length:
            storage = storage.fork()
            storage.truncate_from(0)
        storages.append(storage)
    other.storage = join(storages, shifts)
    rows = np.repeat(np.arange(len(shifts)), shifts)
    places = np.concatenate([np.arange(shift) for shift in shifts])
    return _begun(other, padding_places(rows, places.astype(np.int64)), total)


def taken_out(layer: Any, row: int) -> Any:
    """One sequence of a layer of a batch, without its padding."""
    layer = layer.flushed()
    other = layer.fork()
    if layer.storage is None:
        return other
    padding = layer.padding.positions[layer.padding.rows == row]
    other.storage = take_out(layer.storage, row, padding)
    return _begun(other, NO_PADDING, layer.get_seq_length() - len(padding))


def _begun(layer: Any, padding: Any, seen: int) -> Any:
    """A layer with another storage, whose counters are those of ``seen`` confirmed tokens."""
    layer.padding, layer._seen, layer._checked = padding, seen, None
    layer.rollback = RollbackWindow(layer.index, layer.sliding_window)
    if isinstance(layer.storage, PreRopeStorage):
        layer.storage.padding = padding
    layer.version += 1
    return layer
