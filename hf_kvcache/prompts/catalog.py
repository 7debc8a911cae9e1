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
        damaged: files that are skipped, by name: the :meth:`.DiskTier.identity` of each. Another file of that name is
            looked at again.
    """

    def __init__(self, disk: DiskTier | None, only_whole: bool) -> None:
        self._disk, self._only_whole = disk, only_whole
        self._tree: RadixTree[Entry] = RadixTree()
        self._files: dict[str, Entry | None] = {}  # entries by the name of their files; None where ids are not known
        self._private_files = DigestIndex()
        self.damaged: dict[str, object] = {}

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
        for name in names - set(self._files):
            if name not in self.damaged or self.damaged[name] != self._identity(name):
                self._add_file(name)

    def note_written(self, name: str, entry: Entry, replaced: list[str]) -> None:
        """Take note that an entry has a file now, in place of others."""
        self._tree.insert(entry.ids, entry)
        self._files[name], entry.file, entry.lost = entry, name, False
        for other in replaced:
            self.forget_file(other)

    def note_damaged(self, name: str, error: Exception, identity: object) -> None:
        """Skip a file from now on, with one warning; ``identity`` is that of the file that was read."""
        warned = name in self.damaged
        self.damaged[name] = identity
        self.forget_file(name)
        if not warned:
            warnings.warn(f"a stored prompt is skipped: {error}", RuntimeWarning, stacklevel=2)

    def note_good(self, name: str) -> None:
        """Take note that a file of this name was read to its end or written: it is not damaged, or no longer."""
        self.damaged.pop(name, None)

    def forget_file(self, name: str) -> None:
        """Take note that a file is gone."""
        entry = self._files.pop(name, None)
        self._private_files.remove(name)
        if entry is not None:
            entry.file, entry.lost = None, True
            self.forget_if_gone(entry)

    def is_covered(self, entry: Entry) -> bool:
        """Whether the file of a longer prompt has the tokens of an entry too."""
        depth, _, below = self._tree.match(entry.ids)
        return depth == len(entry.ids) and any(other.file is not None for other in below if other is not entry)

    def _identity(self, name: str) -> object:
        assert self._disk is not None
        return self._disk.identity(name)

    def _add_file(self, name: str) -> None:
        assert self._disk is not None
        identity = self._identity(name)
        try:
            about = self._disk.about(name)
            ids = prompt_tokens(about)
            if about.get("prompt_digests", [None])[-1] != name:
                raise ValueError("the file does not have the name of its prompt")
            digests = [str(x) for x in about["prompt_digests"]]
        except (OSError, ValueError) as error:
            if identity is not None and self._identity(name) == identity:
                self.note_damaged(name, error, identity)
            return
        if ids is None:
            self._files[name] = None
            self._private_files.add(name, int(about["seen"]), digests)
        else:
            self.note_written(name, self._tree.get(ids) or Entry(ids), [])


def _of_entry(length: int, entry: Entry) -> Candidate:
    return Candidate(length, "memory" if entry.cache is not None else "disk", entry, entry.file or "")
