"""Which prompts are stored on this machine, in memory or in files, and which of them begin like a given one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from hf_kvcache.prompts.digests import DigestIndex
from hf_kvcache.prompts.disk import DiskTier
from hf_kvcache.prompts.entry import Entry
from hf_kvcache.prompts.files import prompt_tokens
from hf_kvcache.prompts.tree import RadixTree

#: Prompts that begin alike and are tried one after the other, since each may have dropped what is needed.
_TRIED = 8


@dataclass(frozen=True)
class Candidate:
    """A stored prompt that has ``length`` of the tokens that are looked for."""

    length: int
    tier: str
    entry: Entry | None = None
    name: str = ""


class Catalog:
    """The stored prompts by their tokens, or by digests of these. Not safe for threads by itself.

    Args:
        disk: the files; None for none.
        only_whole: whether a prompt is of use only as a whole.

    Attributes:
        damaged: names of files that are skipped.
    """

    def __init__(self, disk: DiskTier | None, only_whole: bool) -> None:
        self._disk, self._only_whole = disk, only_whole
        self._tree: RadixTree[Entry] = RadixTree()
        self._files: dict[str, Entry | None] = {}  # entries by the name of their files; None where ids are not known
        self._private_files = DigestIndex()
        self.damaged: set[str] = set()

    @property
    def files(self) -> int:
        """Number of files."""
        return len(self._files)

    def candidates(self, ids: np.ndarray) -> list[Candidate]:
        """The stored prompts that begin with some of ``ids``."""
        depth, path, below = self._tree.match(ids)
        found = [_of_entry(length, entry) for length, entry in path]
        if depth and not self._only_whole:
            found += [_of_entry(depth, entry) for entry in islice(below, _TRIED)]
        private = self._private_files.match(ids)
        return found + [Candidate(n, "disk", None, name) for n, name, whole in private if whole or not self._only_whole]

    def beginnings(self, ids: np.ndarray) -> list[Entry]:
        """The stored prompts that ``ids`` begin with."""
        return [entry for _, entry in self._tree.match(ids)[1]]

    def get(self, ids: np.ndarray) -> Entry | None:
        """The entry of exactly these tokens."""
        return self._tree.get(ids)

    def of_file(self, name: str) -> Entry | None:
        """The entry of a file; None if there is none."""
        return self._files.get(name)

    def insert(self, entry: Entry) -> None:
        """Add an entry."""
        self._tree.insert(entry.ids, entry)

    def entries(self) -> Iterator[Entry]:
        """All entries whose tokens are known."""
        return self._tree.match(np.zeros(0, np.int64))[2]

    def forget_if_gone(self, entry: Entry) -> None:
        """Forget an entry that has neither a cache nor a file."""
        gone = entry.cache is None and entry.file is None and entry.written.is_set()
        if gone and self._tree.get(entry.ids) is entry:
            self._tree.remove(entry.ids)

    # -- files ----------------------------------------------------------------------------------------------------

    def look_at_disk(self) -> None:
        """Take note of files that have come or gone, whoever wrote or deleted them."""
        names = None if self._disk is None else self._disk.names()
        if names is None:
            return
        for name in set(self._files) - names:
            self.forget_file(name)
        for name in names - set(self._files) - self.damaged:
            self._add_file(name)

    def note_written(self, name: str, entry: Entry, replaced: list[str]) -> None:
        """Take note that an entry has a file now, in place of others."""
        self.damaged.discard(name)
        self._tree.insert(entry.ids, entry)
        self._files[name], entry.file = entry, name
        for other in replaced:
            self.forget_file(other)

    def note_damaged(self, name: str, error: Exception) -> None:
        """Skip a file from now on, with one warning."""
        if name not in self.damaged:
            self.damaged.add(name)
            self.forget_file(name)
            warnings.warn(f"a stored prompt is skipped: {error}", RuntimeWarning, stacklevel=2)

    def forget_file(self, name: str) -> None:
        """Take note that a file is gone."""
        entry = self._files.pop(name, None)
        self._private_files.remove(name)
        if entry is not None:
            entry.file = None
            self.forget_if_gone(entry)

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
                self.note_damaged(name, error)
            return
        if ids is None:
            self._files[name] = None
            self._private_files.add(name, int(about["seen"]), digests)
        else:
            self.note_written(name, self._tree.get(ids) or Entry(ids), [])


def _of_entry(length: int, entry: Entry) -> Candidate:
    return Candidate(length, "memory" if entry.cache is not None else "disk", entry, entry.file or "")
