"""Prompts in memory, within a budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from hf_kvcache.cache.base import KVCache
from hf_kvcache.prompts.accounting import Held
from hf_kvcache.prompts.entry import Entry


class MemoryTier:
    """Entries whose caches are in memory, the one that was used last at the end. Not safe for threads by itself.

    Whoever fetched a prompt has a fork of its cache, which keeps what it needs when the entry is dropped.

    Args:
        budget: bytes of all entries together.
        dropped: is called with an entry that has lost its cache.
    """

    def __init__(self, budget: int, dropped: Callable[[Entry], None]) -> None:
        self.budget, self.evictions = budget, 0
        self._entries: OrderedDict[Entry, None] = OrderedDict()
        self._held = Held()
        self._dropped = dropped

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def used(self) -> int:
        """Bytes that the entries take."""
        return self._held.total

    def check_fits(self, cache: KVCache) -> None:
        """Raise ValueError if a cache alone is over the budget."""
        alone = Held()
        alone.add(cache)
        if alone.total > self.budget:
            raise ValueError(
                f"memory={self.budget!r} bytes is less than this prompt of {cache.get_seq_length()} tokens takes; "
                f"accepted: from {alone.total}"
            )

    def add(self, entry: Entry, cache: KVCache) -> bool:
        """Give an entry a cache, and make room for it before; returns whether there was room."""
        while self._held.total + self._held.cost(cache) > self.budget:
            if not self._entries:
                return False
            self.drop(next(iter(self._entries)))
            self.evictions += 1
        entry.cache = cache
        self._held.add(cache)
        self._entries[entry] = None
        return True

    def use(self, entry: Entry) -> None:
        """Make an entry the one that was used last."""
        if entry in self._entries:
            self._entries.move_to_end(entry)

    def drop(self, entry: Entry) -> None:
        """Take the cache of an entry out of memory. One that waits to be written is written first."""
        cache = entry.cache
        if cache is None:
            return
        entry.written.wait()
        del self._entries[entry]
        self._held.remove(cache)
        entry.cache = None
        self._dropped(entry)
