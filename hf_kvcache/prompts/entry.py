"""A stored prompt, and what its cache allows."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_kvcache.cache.base import KVCache
from hf_kvcache.layers.base import KVCacheLayer


@dataclass(eq=False)
class Entry:
    """A prompt that is held in memory, in a file, or both.

    Attributes:
        ids: int64 ``[n]``, its tokens.
        cache: the cache after these tokens, which is forked and never changed; None if it is not in memory.
        file: name of its file; None if there is none.
        lost: whether it had a file that is gone.
        written: set unless the entry waits to be written.
    """

    ids: np.ndarray
    cache: KVCache | None = None
    file: str | None = None
    lost: bool = False
    written: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.written.set()


def only_whole(cache: KVCache) -> bool:
    """Whether a cache is of use only after all of its tokens, since what it dropped or summed up depends on them."""
    if cache.options.eviction is not None:
        return True
    return any(not isinstance(layer, KVCacheLayer) for layer in cache.layers)


def can_crop(cache: KVCache, length: int) -> bool:
    """Whether a cache can return to its first ``length`` tokens as if it had never seen the others."""
    seen = cache.get_seq_length()
    if length == seen:
        return True
    if length > seen or only_whole(cache):
        return False
    try:
        for layer in cache.own_layers:
            if layer.is_initialized:
                layer.check_crop(length - seen)
    except RuntimeError:
        return False
    return True


def cropped(cache: KVCache, length: int) -> KVCache:
    """A fork of a cache with its first ``length`` tokens; see :func:`can_crop`."""
    fork: Any = cache.fork()
    if length < fork.get_seq_length():
        fork.crop(length - fork.get_seq_length())
    return fork
