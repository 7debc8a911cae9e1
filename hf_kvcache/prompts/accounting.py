"""The bytes of many caches that share pages: each page counts once."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np

from hf_kvcache.cache.base import KVCache
from hf_kvcache.cache.memory import layer_report
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.pool import PagePool

#: The page ids of a cache, by the pool that they are in.
Pages = dict[PagePool, np.ndarray]


class Held:
    """Counts the references of a set of caches to the pages of their pools. Caches of others do not count."""

    def __init__(self) -> None:
        self._references: WeakKeyDictionary[PagePool, dict[int, int]] = WeakKeyDictionary()
        self._own: dict[int, tuple[Pages, int]] = {}

    def add(self, cache: KVCache) -> None:
        """Count a cache in. It must not change as long as it is counted."""
        pages, rest = pages_of(cache), bytes_beside_pages(cache)
        self._own[id(cache)] = pages, rest
        for pool, ids in pages.items():
            counts = self._references.setdefault(pool, {})
            for page in ids.tolist():
                counts[page] = counts.get(page, 0) + 1

    def remove(self, cache: KVCache) -> None:
        """Count a cache out."""
        pages, _ = self._own.pop(id(cache))
        for pool, ids in pages.items():
            counts = self._references[pool]
            for page in ids.tolist():
                counts[page] -= 1
                if not counts[page]:
                    del counts[page]
            if not counts:
                del self._references[pool]

    def cost(self, cache: KVCache) -> int:
        """Bytes that adding a cache would add."""
        new = 0
        for pool, ids in pages_of(cache).items():
            counts = self._references.get(pool, {})
            pages = sum(page not in counts for page in ids.tolist())
            # With the first cache of a pool the pages that nobody uses count too.
            unused = pool.free_pages if not counts else 0
            new += (pages + unused) * pool.record_bytes
        return new + bytes_beside_pages(cache)

    @property
    def total(self) -> int:
        """Bytes of all pages that the caches hold, pages of their pools that nobody holds, and all else of them."""
        pages = sum(
            (len(counts) + pool.free_pages) * pool.record_bytes for pool, counts in list(self._references.items())
        )
        return pages + sum(rest for _, rest in self._own.values())


def pages_of(cache: KVCache) -> Pages:
    """The distinct page ids of a cache, by pool."""
    found: Pages = {}
    for layer in cache.own_layers:
        storage = layer.storage
        if isinstance(storage, PagedStorage):
            ids = np.unique(storage.table.page_ids())
            if len(ids):
                found[storage.pool] = ids
    return found


def bytes_beside_pages(cache: KVCache) -> int:
    """Bytes of full-precision tokens, tables, states and all else that a cache does not share."""
    total = 0
    for layer in cache.layers:
        total += layer_report(layer).total
        storage = getattr(layer, "storage", None)
        if isinstance(storage, PagedStorage):
            pages = len(np.unique(storage.table.page_ids())) + storage.pool.free_pages
            total -= pages * storage.pool.record_bytes
    return total
