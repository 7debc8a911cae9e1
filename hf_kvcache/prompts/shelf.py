"""Stored prompts of one namespace, in memory, on disk and elsewhere: finding one, and adding one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from hf_kvcache.cache.base import KVCache
from hf_kvcache.prompts.accounting import Held
from hf_kvcache.prompts.catalog import Candidate, Catalog
from hf_kvcache.prompts.disk import DiskTier
from hf_kvcache.prompts.entry import Entry, can_crop, cropped, only_whole
from hf_kvcache.prompts.files import check_file, read_content, read_prompt
from hf_kvcache.prompts.filing import Filing
from hf_kvcache.prompts.memory import MemoryTier
from hf_kvcache.prompts.remote_tier import RemoteTier
from hf_kvcache.prompts.stats import StoreStats

#: Order in which equally long prompts are tried.
_RANK = {"memory": 0, "disk": 1, "remote": 2}


class Shelf:
    """Stored prompts. Safe for several threads.

    Args:
        make_cache: makes an empty cache.
        memory: bytes of entries in memory.
        disk: files; None for none.
        remote: files elsewhere; None for none.
        private: whether files hold digests of the tokens in their place.

    Attributes:
        device: where caches from files are to lie; None leaves them in the mapped file until they are used.
    """

    def __init__(
        self,
        make_cache: Callable[[], KVCache],
        memory: int,
        disk: DiskTier | None,
        remote: RemoteTier | None,
        private: bool,
    ) -> None:
        self._make_cache, self._disk, self._remote = make_cache, disk, remote
        empty = make_cache()
        self._only_whole = only_whole(empty)
        replaceable = not self._only_whole and all(x.sliding_window is None for x in empty.own_layers)
        self.device: Any = None
        self._lock = threading.RLock()
        self._catalog = Catalog(disk, self._only_whole)
        self._memory = MemoryTier(memory, self._catalog.forget_if_gone)
        self._filing = Filing(self._catalog, disk, remote, private, replaceable)
        self._stats = StoreStats()

    # -- finding --------------------------------------------------------------------------------------------------

    def find(self, ids: np.ndarray, least: int = 1) -> tuple[KVCache | None, int, str]:
        """A fork of the cache of the longest stored beginning of ``ids [T]``, its length and its tier.

        None, 0 and no tier if there is none of ``least`` tokens.
        """
        with self._locked():
            self._catalog.look_at_disk()
            candidates = self._catalog.candidates(ids)
        best = max((candidate.length for candidate in candidates), default=0)
        if self._remote is not None and best < len(ids):
            found = self._remote.match(ids)
            candidates += [
                Candidate(n, "remote", None, name)
                for n, name, whole in found
                if n > best and (whole or not self._only_whole)
            ]
        candidates = [candidate for candidate in candidates if candidate.length >= least]
        gone = set()  # a file may be a candidate twice
        for candidate in sorted(candidates, key=lambda x: (-x.length, _RANK[x.tier])):
            file = candidate.tier, candidate.name
            cache = None if file in gone else self._open(candidate)
            gone |= {file} if cache is None and candidate.name else set()
            if cache is not None and can_crop(cache, candidate.length):
                return cropped(cache, candidate.length), candidate.length, candidate.tier
        return None, 0, ""

    def note(self, tokens: int, saved: int, tier: str) -> None:
        """Count a request of ``tokens`` tokens, of which ``saved`` were found in a tier."""
        with self._lock:
            self._stats.count(tokens, saved, tier)

    def _open(self, candidate: Candidate) -> KVCache | None:
        """The cache of a stored prompt, not to be changed; None if it is gone or damaged."""
        entry, name = candidate.entry, candidate.name
        with self._lock:
            cache = None if entry is None else entry.cache
            if entry is not None and cache is not None:
                self._memory.use(entry)
                if entry.file is not None and self._disk is not None:
                    self._disk.touch(entry.file)
                # A file that made room for others is written again, unless prompts that have never had one wait.
                again = entry.lost and self._filing.idle and self._filing.lacks_file(entry)
        if entry is not None and cache is not None:
            if again:
                self._write_later(entry, cache)
            return cache
        if candidate.tier == "remote":
            return self._download(name)
        return self._read(name) if name else None

    def _read(self, name: str) -> KVCache | None:
        assert self._disk is not None
        identity = self._disk.identity(name)  # other processes delete and write files at any moment
        try:
            cache = read_prompt(self._disk.path(name), self._make_cache(), name, self.device)
        except (OSError, ValueError) as error:
            with self._lock:
                if identity is not None and self._disk.identity(name) == identity:
                    self._catalog.note_damaged(name, error, identity)
                else:
                    self._catalog.forget_file(name)
            return None
        self._disk.touch(name)
        self._hold_file(name, cache)
        return cache

    def _hold_file(self, name: str, cache: KVCache) -> None:
        """Keep the cache of a file in memory, if the tokens are known."""
        with self._lock:
            self._catalog.note_good(name)
            entry = self._catalog.of_file(name)
            if entry is not None and entry.cache is None:
                self._hold(entry, cache)

    def _download(self, name: str) -> KVCache | None:
        assert self._remote is not None
        content = self._remote.read(name)
        if content is None:
            return None
        if self._disk is not None and self._write_download(name, content):
            downloaded = self._read(name)
            if downloaded is None:
                self._remote.forget(name)
                self._disk.delete(name)
                return None
            with self._locked():
                self._catalog.look_at_disk()
                self._hold_file(name, downloaded)
            return downloaded
        try:
            cache, ids = read_content(content, self._make_cache(), name, self.device)
        except ValueError as error:
            self._remote.forget(name)
            with self._lock:
                self._catalog.note_damaged(name, error, None)
            return None
        with self._lock:
            self._catalog.note_good(name)
            if ids is not None:
                entry = self._catalog.get(ids) or Entry(ids)
                if entry.cache is None:
                    self._hold(entry, cache)
                if entry.cache is not None:
                    self._catalog.insert(entry)
        return cache

    def _write_download(self, name: str, content: bytes) -> bool:
        """Write a file from elsewhere to the disk, in place of a damaged one; returns whether it is there."""
        assert self._disk is not None
        if name in self._catalog.damaged:
            self._disk.delete(name)
        try:
            return self._disk.write(name, len(content), lambda file: file.write(content), [])
        except (OSError, ValueError) as error:
            self._filing.note_failure(error)
            return False

    def _hold(self, entry: Entry, cache: KVCache) -> None:
        """Keep a cache in memory, if it fits."""
        alone = Held()
        alone.add(cache)
        if alone.total <= self._memory.budget and not self._memory.add(entry, cache):
            self._stats.not_stored += 1

    # -- storing --------------------------------------------------------------------------------------------------

    def store(self, prompts: list[tuple[np.ndarray, KVCache]]) -> None:
        """Keep caches, which nobody changes any more, each as that of its tokens ``[T]``.

        Raises:
            ValueError: if one of the caches alone is over a budget, or cannot be saved. Then none is kept.
        """
        for ids, cache in prompts:
            self._memory.check_fits(cache)
            if self._disk is not None or self._remote is not None:
                check_file(cache, len(ids), None if self._disk is None else self._disk.budget)
        for ids, cache in prompts:
            self._store(ids, cache)

    def _store(self, ids: np.ndarray, cache: KVCache) -> None:
        with self._locked():
            self._catalog.look_at_disk()
            entry = self._catalog.get(ids) or Entry(ids)
            if entry.cache is not None:
                cache = entry.cache
                self._memory.use(entry)
            elif not self._memory.add(entry, cache):
                self._stats.not_stored += 1
            writes = self._filing.lacks_file(entry) or self._filing.is_wanted_elsewhere(entry)
            if entry.cache is not None or writes:
                self._catalog.insert(entry)
        if writes:
            self._write_later(entry, cache)

    def _write_later(self, entry: Entry, cache: KVCache) -> None:
        """Write an entry in the background. The caller does not hold the lock, since the queue may be full."""
        with self._lock:
            task = self._filing.task(entry, cache)
        if task is not None:
            self._filing.add(task)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The lock, with all notes read."""
        with self._lock:
            self._filing.read_notes()
            yield

    # -- the whole ------------------------------------------------------------------------------------------------

    def stats(self) -> StoreStats:
        """What was done, and what is held."""
        with self._locked():
            self._catalog.look_at_disk()
            found = StoreStats(**{**vars(self._stats), "hits_by_tier": dict(self._stats.hits_by_tier)})
            found.damaged = len(self._catalog.damaged)
            disk, remote = self._disk, self._remote
            found.entries = {"memory": len(self._memory), "disk": self._catalog.files, "remote": len(remote or ())}
            found.bytes = {"memory": self._memory.used, "disk": disk.used if disk else 0, "remote": 0}
            found.evictions = {"memory": self._memory.evictions, "disk": disk.evictions if disk else 0, "remote": 0}
            found.failures = self._filing.failures + (remote.failures if remote is not None else 0)
            return found

    def flush(self) -> None:
        """Wait until all prompts are written."""
        self._filing.flush()

    def close(self) -> None:
        """Write all prompts, and end the background thread."""
        self._filing.close()

    def entries(self) -> list[Entry]:
        """All entries whose tokens are known."""
        with self._locked():
            return list(self._catalog.entries())
