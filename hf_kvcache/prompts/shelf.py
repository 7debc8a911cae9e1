"""Stored prompts of one namespace, in memory, on disk and elsewhere, and finding them."""

from __future__ import annotations

import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hf_kvcache.cache.base import KVCache
from hf_kvcache.cache.serialization import describe_settings
from hf_kvcache.layers.evicting import EvictingLayer
from hf_kvcache.prompts.accounting import Held
from hf_kvcache.prompts.digests import DigestIndex, name_of
from hf_kvcache.prompts.disk import DiskTier
from hf_kvcache.prompts.entry import Entry, can_crop, cropped, only_whole
from hf_kvcache.prompts.files import PromptFile, largest_file, prompt_tokens, read_prompt
from hf_kvcache.prompts.memory import MemoryTier
from hf_kvcache.prompts.remote_tier import RemoteTier
from hf_kvcache.prompts.stats import StoreStats
from hf_kvcache.prompts.tree import RadixTree
from hf_kvcache.prompts.writer import BackgroundWriter

#: Prompts that begin alike and are tried one after the other, since each may have dropped what is needed.
_TRIED = 8
#: Order in which equally long prompts are tried.
_RANK = {"memory": 0, "disk": 1, "remote": 2}


@dataclass(frozen=True)
class _Candidate:
    """A stored prompt that has ``length`` of the tokens that are looked for."""

    length: int
    tier: str
    entry: Entry | None = None
    name: str = ""


class Shelf:
    """Stored prompts. Safe for several threads.

    Args:
        make_cache: makes an empty cache.
        memory: bytes of entries in memory.
        disk: files; None for none.
        remote: files elsewhere; None for none.
        private: whether files say of which tokens they are.
    """

    def __init__(
        self,
        make_cache: Callable[[], KVCache],
        memory: int,
        disk: DiskTier | None,
        remote: RemoteTier | None,
        private: bool,
    ) -> None:
        self._make_cache, self._disk, self._remote, self._private = make_cache, disk, remote, private
        empty = make_cache()
        self._settings = describe_settings(empty.options)
        self.only_whole = only_whole(empty)
        #: Whether a longer prompt can always stand in for one that it begins with.
        self._replaceable = not self.only_whole and all(x.sliding_window is None for x in empty.own_layers)
        self.device: Any = None
        self._lock = threading.RLock()
        self._tree: RadixTree[Entry] = RadixTree()
        self._memory = MemoryTier(memory, self._forget_if_gone)
        self._files: dict[str, Entry | None] = {}  # entries by the name of their files; None where ids are not known
        self._private_files = DigestIndex()
        self._damaged: set[str] = set()
        self._writer = BackgroundWriter()
        self._notes: deque[Callable[[], None]] = deque()  # what the background thread has done
        self._stats = StoreStats()

    # -- finding --------------------------------------------------------------------------------------------------

    def find(self, ids: np.ndarray) -> tuple[KVCache | None, int, str]:
        """A fork of the cache of the longest stored beginning of ``ids [T]``, its length and its tier."""
        self._look_at_disk()
        candidates = self._local(ids)
        best = max((candidate.length for candidate in candidates), default=0)
        if best < len(ids):
            candidates += [found for found in self._elsewhere(ids) if found.length > best]
        for candidate in sorted(candidates, key=lambda x: (-x.length, _RANK[x.tier])):
            cache = self._open(candidate, ids)
            if cache is not None and can_crop(cache, candidate.length):
                return cropped(cache, candidate.length), candidate.length, candidate.tier
        return None, 0, ""

    def note(self, tokens: int, saved: int, tier: str) -> None:
        """Count a request of ``tokens`` tokens, of which ``saved`` were found in a tier."""
        with self._lock:
            self._stats.requests += 1
            self._stats.tokens_requested += tokens
            self._stats.tokens_saved += saved
            if saved:
                self._stats.hits += 1
                self._stats.hits_by_tier[tier] += 1

    def _local(self, ids: np.ndarray) -> list[_Candidate]:
        with self._locked():
            depth, path, below = self._tree.match(ids)
            found = [self._candidate(length, entry) for length, entry in path]
            if depth and not self.only_whole:
                found += [self._candidate(depth, entry) for entry in islice(below, _TRIED)]
            private = self._private_files.match(ids)
        found += [_Candidate(n, "disk", None, name) for n, name, whole in private if whole or not self.only_whole]
        return [x for x in found if x.length]

    @staticmethod
    def _candidate(length: int, entry: Entry) -> _Candidate:
        return _Candidate(length, "memory" if entry.cache is not None else "disk", entry, entry.file or "")

    def _elsewhere(self, ids: np.ndarray) -> list[_Candidate]:
        found = [] if self._remote is None else self._remote.match(ids)
        return [_Candidate(n, "remote", None, name) for n, name, whole in found if whole or not self.only_whole]

    def _open(self, candidate: _Candidate, ids: np.ndarray) -> KVCache | None:
        """The cache of a stored prompt, not to be changed; None if it is gone or damaged."""
        entry, name = candidate.entry, candidate.name
        with self._lock:
            if entry is not None and entry.cache is not None:
                self._memory.use(entry)
                if entry.file is not None and self._disk is not None:
                    self._disk.touch(entry.file)
                return entry.cache
        if candidate.tier == "remote":
            return self._download(name)
        return self._read(name) if name else None

    def _read(self, name: str) -> KVCache | None:
        assert self._disk is not None
        path = self._disk.path(name)
        try:
            cache = read_prompt(path, self._make_cache(), name, self.device)
        except (OSError, ValueError) as error:
            if path.exists():
                self._note_damaged(name, error)
            else:
                self._forget_file(name)
            return None
        self._disk.touch(name)
        with self._lock:
            entry = self._files.get(name)
            if entry is not None and entry.cache is None:
                self._hold(entry, cache)
        return cache

    def _hold(self, entry: Entry, cache: KVCache) -> None:
        """Keep a cache in memory, if it fits."""
        alone = Held()
        alone.add(cache)
        if alone.total <= self._memory.budget and not self._memory.add(entry, cache):
            self._stats.not_stored += 1

    # -- storing --------------------------------------------------------------------------------------------------

    def store(self, ids: np.ndarray, cache: KVCache) -> None:
        """Keep a cache, which nobody changes any more, as that of ``ids [T]``.

        Raises:
            ValueError: if the cache alone is over a budget.
        """
        with self._locked():
            self._memory.check_fits(cache)
            self._check_files(cache, ids)
            entry = self._tree.get(ids)
            if entry is not None and entry.cache is not None:
                self._memory.use(entry)
                return
            if entry is None:
                entry = Entry(ids)
            _, path, _ = self._tree.match(ids)
            if not self._memory.add(entry, cache):
                self._stats.not_stored += 1
            on_disk = entry.file is not None and entry.file not in self._damaged
            writes = (self._disk is not None and not on_disk) or self._remote is not None
            if entry.cache is not None or writes:
                self._tree.insert(ids, entry)
            if writes:
                entry.written.clear()
        if writes:
            replaced = [e.file for _, e in path if e.file is not None and e is not entry] if self._replaceable else []
            self._writer.add(lambda: self._write(entry, cache, replaced))

    def _check_files(self, cache: KVCache, ids: np.ndarray) -> None:
        """Raise ValueError if the cache cannot be saved, or its file alone is over the budget."""
        if self._disk is None and self._remote is None:
            return
        for layer in cache.own_layers:
            if isinstance(layer, EvictingLayer) and layer.evictor is not None and layer.evictor.schedule.pending:
                raise ValueError("the prompt waits to be evicted; call compress() before the cache is put in the store")
        size = largest_file(cache, len(ids))
        if self._disk is not None and size > self._disk.budget:
            raise ValueError(
                f"disk={self._disk.budget!r} bytes may be less than the file of this prompt of {len(ids)} tokens takes;"
                f" accepted: from {size}"
            )

    def check_settings(self, cache: KVCache) -> None:
        """Raise ValueError unless a cache has the settings of those that this store makes."""
        for name, value in describe_settings(cache.options).items():
            if value != self._settings[name]:
                raise ValueError(
                    f"the cache has {name}={value!r}; accepted by this store: {self._settings[name]!r}, as make_cache "
                    "makes them"
                )

    def _write(self, entry: Entry, cache: KVCache, replaced: list[str]) -> None:
        """Write a prompt to the disk and to the remote tier, in the background.

        Whoever holds the lock may wait for this, so it must not wait for the lock: it leaves notes.
        """
        name = name_of(entry.ids)
        try:
            prompt = PromptFile(cache, entry.ids, self._private)
            if self._disk is not None:
                if name in self._damaged:
                    self._disk.delete(name)
                if self._disk.write(name, prompt.size, prompt.write, replaced):
                    self._notes.append(lambda: self._note_written(name, entry, replaced))
        except Exception as error:
            entry.written.set()
            self._notes.append(self._note_failure)
            what = f"a prompt could not be written to the disk: {type(error).__name__}: {error}"
            warnings.warn(what, RuntimeWarning, stacklevel=2)
            return
        finally:
            entry.written.set()
            self._notes.append(lambda: self._forget_if_gone(entry))
        if self._remote is not None:
            self._remote.write(name, prompt)

    def _note_written(self, name: str, entry: Entry, replaced: list[str]) -> None:
        self._damaged.discard(name)
        entry.file = name
        self._files[name] = entry
        for other in replaced:
            self._forget_file(other)

    def _note_failure(self) -> None:
        self._stats.failures += 1

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The lock, with all notes read."""
        with self._lock:
            while self._notes:
                self._notes.popleft()()
            yield

    # -- the disk -------------------------------------------------------------------------------------------------

    def _look_at_disk(self) -> None:
        """Take note of files that have come or gone, whoever wrote or deleted them."""
        if self._disk is None:
            return
        with self._locked():
            names = self._disk.names()
            if names is None:
                return
            for name in set(self._files) - names:
                self._forget_file(name)
            for name in names - set(self._files) - self._damaged:
                self._add_file(name)

    def _add_file(self, name: str) -> None:
        assert self._disk is not None
        try:
            about = self._disk.about(name)
            ids = prompt_tokens(about)
            if about.get("prompt_digests", [None])[-1] != name:
                raise ValueError("the file does not have the name of its prompt")
            digests = [str(x) for x in about["prompt_digests"]]
        except (OSError, ValueError) as error:
            if self._disk.path(name).exists():
                self._note_damaged(name, error)
            return
        if ids is None:
            self._files[name] = None
            self._private_files.add(name, int(about["seen"]), digests)
            return
        entry = self._tree.get(ids)
        if entry is None:
            entry = Entry(ids)
            self._tree.insert(ids, entry)
        entry.file = name
        self._files[name] = entry

    def _forget_file(self, name: str) -> None:
        with self._lock:
            entry = self._files.pop(name, None)
            self._private_files.remove(name)
            if entry is not None:
                entry.file = None
                self._forget_if_gone(entry)

    def _forget_if_gone(self, entry: Entry) -> None:
        """Forget an entry that has neither a cache nor a file."""
        gone = entry.cache is None and entry.file is None and entry.written.is_set()
        if gone and self._tree.get(entry.ids) is entry:
            self._tree.remove(entry.ids)

    def _note_damaged(self, name: str, error: Exception) -> None:
        with self._lock:
            if name in self._damaged:
                return
            self._damaged.add(name)
            self._stats.damaged += 1
            self._forget_file(name)
        warnings.warn(f"a stored prompt is skipped: {error}", RuntimeWarning, stacklevel=2)

    def _download(self, name: str) -> KVCache | None:
        assert self._remote is not None
        content = self._remote.read(name)
        if content is None:
            return None
        if self._disk is not None and self._disk.write(name, len(content), lambda file: file.write(content), []):
            self._look_at_disk()
            return self._read(name)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "prompt"
            path.write_bytes(content)
            try:
                cache = read_prompt(path, self._make_cache(), name, self.device)
                ids = prompt_tokens(KVCache.about_file(path))
            except ValueError as error:
                self._remote.forget(name)
                self._note_damaged(name, error)
                return None
        if ids is not None:
            self._hold_new(ids, cache)
        return cache

    def _hold_new(self, ids: np.ndarray, cache: KVCache) -> None:
        with self._lock:
            entry = self._tree.get(ids) or Entry(ids)
            if entry.cache is None:
                self._hold(entry, cache)
            if entry.cache is not None:
                self._tree.insert(ids, entry)

    # -- the whole ------------------------------------------------------------------------------------------------

    def stats(self) -> StoreStats:
        """What was done, and what is held."""
        self._look_at_disk()
        with self._locked():
            found = StoreStats(**{**vars(self._stats), "hits_by_tier": dict(self._stats.hits_by_tier)})
            found.entries = {"memory": len(self._memory), "disk": len(self._files), "remote": 0}
            found.entries["remote"] = 0 if self._remote is None else len(self._remote)
            found.failures += 0 if self._remote is None else self._remote.failures
            found.bytes = {"memory": self._memory.used, "disk": self._disk.used if self._disk else 0, "remote": 0}
            found.evictions = {"memory": self._memory.evictions, "disk": 0, "remote": 0}
            found.evictions["disk"] = self._disk.evictions if self._disk else 0
            return found

    def flush(self) -> None:
        """Wait until all prompts are written."""
        self._writer.flush()

    def close(self) -> None:
        """Write all prompts, and end the background thread."""
        self._writer.close()

    def entries(self) -> Iterator[Entry]:
        """All entries whose tokens are known."""
        with self._locked():
            return iter(list(self._tree.match(np.zeros(0, np.int64))[2]))
