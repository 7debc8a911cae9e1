"""Reference-counted pages in slabs that never move."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch

from hf_kvcache.storage.integrity import IntegrityError
from hf_kvcache.storage.slabs import Slab, Slabs, SlabSource


class PageHolder(Protocol):
    """An object that holds references to pages: a page table."""

    def page_ids(self) -> np.ndarray: ...


class PagePool:
    """Pages of one layer as rows of uint8 slabs.

    The pool grows by adding slabs, so growth copies nothing and addresses stay valid. Pages are immutable once
    written; sequences share them by counting references. A slab without a used page is given back to the allocator.

    Forks share a pool and may decode in threads of their own: whatever changes the bookkeeping holds a lock, which is
    once a page and not once a token. Reading and writing the contents of pages that one holds needs none.

    Args:
        record_bytes: bytes of a page.
        device: where pages are made and read.
        target: where they lie outside of the device; None if they lie on it.

    Attributes:
        memory: the slabs.
    """

    def __init__(self, record_bytes: int, device: torch.device, target: SlabSource | None = None) -> None:
        self.record_bytes, self.device, self.target = record_bytes, device, target
        self.memory = Slabs(record_bytes, device, target)
        self._references = np.zeros(0, dtype=np.int32)
        self._editions = np.zeros(0, dtype=np.int32)
        self._free = np.zeros(0, dtype=np.int64)
        #: Original positions of pages whose tokens do not stand side by side; the others store only their first.
        self.positions: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        #: Ids that tables held which are gone, until someone holds the lock.
        self._abandoned: deque[np.ndarray] = deque()
        self._holders: weakref.WeakSet[PageHolder] = weakref.WeakSet()

    @property
    def held_pages(self) -> int:
        """Pages that are allocated, used or free."""
        with self._lock:
            return self.memory.held

    @property
    def free_pages(self) -> int:
        """Pages that are allocated and that no table refers to."""
        with self._lock:
            live = np.concatenate([np.zeros(0, np.int64), *self._live_ids()])
            return int((self._referring()[live] == 0).sum())

    def references(self, ids: np.ndarray) -> np.ndarray:
        """How many table entries refer to each of ``ids``."""
        with self._lock:
            return self._referring()[ids]

    def editions(self, ids: np.ndarray) -> np.ndarray:
        """How often each of ``ids`` was given to a page: with its edition, an id names one page forever."""
        return self._editions[ids]

    def add_holder(self, holder: PageHolder) -> None:
        """Make a table known to :meth:`check`; held weakly."""
        with self._locked():
            self._holders.add(holder)

    def allocate(self, count: int) -> np.ndarray:
        """``count`` ascending page ids with one reference each, whose contents are not yet written."""
        with self._lock:
            self._release_abandoned()
            self._reserve(count)
            ids, self._free = self._free[:count], self._free[count:]
            self._references[ids] = 1
            self._editions[ids] += 1
        return ids

    def reserve(self, count: int) -> None:
        """Have memory for ``count`` more pages.

        Raises:
            OSError: if the pages lie in files and the disk has no room for them.
        """
        with self._locked():
            self._reserve(count)

    def adopt(self, records: torch.Tensor) -> np.ndarray:
        """Make pages of uint8 ``records [n, record_bytes]`` on the pool's device, uncopied unless pages lie elsewhere.

        The pool writes into the tensor once a page of it is free, so nobody else may read or write it.

        Returns:
            The page ids, ascending, with one reference each.
        """
        if records.shape[1:] != (self.record_bytes,) or not records.is_contiguous() or records.dtype != torch.uint8:
            raise ValueError(f"records {records.dtype} {list(records.shape)}; accepted: uint8 [n, {self.record_bytes}]")
        if len(records) == 0:
            return np.zeros(0, dtype=np.int64)
        if self.target is not None:
            ids = self.allocate(len(records))
            self.write(ids, records)
            return ids
        with self._locked():
            ids = self.memory.adopt(Slab(records))
            self._extend()
            self._references[ids] = 1
            self._editions[ids] += 1
        return ids

    def retain(self, ids: np.ndarray) -> None:
        """Add a reference to each of ``ids``, which may repeat."""
        with self._locked():
            np.add.at(self._references, ids, 1)

    def release(self, ids: np.ndarray) -> None:
        """Drop a reference to each of ``ids``, which may repeat; pages without any become free."""
        with self._locked():
            self._release(ids)

    def abandon(self, ids: np.ndarray) -> None:
        """:meth:`release` for finalizers, which may run at any moment, in a thread that holds the lock already."""
        self._abandoned.append(ids)
        if self._lock.acquire(blocking=False):
            try:
                self._release_abandoned()
            finally:
                self._lock.release()

    def note_positions(self, page: int, positions: np.ndarray) -> None:
        """Remember the original position ``[P]`` of each token of a page whose tokens do not stand side by side."""
        with self._locked():
            self.positions[page] = positions

    def scattered_pages(self) -> np.ndarray:
        """The pages for which positions are stored."""
        return np.array(list(self.positions), dtype=np.int64)  # list() is one step, whatever other threads do

    def _release(self, ids: np.ndarray) -> None:
        np.subtract.at(self._references, ids, 1)
        unique = np.unique(ids)
        freed = unique[self._references[unique] == 0]
        if len(freed) == 0:
            return
        for page in freed.tolist() if self.positions else ():
            self.positions.pop(page, None)
        self._free = np.sort(np.concatenate([self._free, freed]))
        self._drop_empty_slabs(freed)

    def write(self, ids: np.ndarray, records: torch.Tensor) -> None:
        """Store uint8 ``records [n, record_bytes]``, on the pool's device, in the pages ``ids``."""
        self.memory.write(ids, records)

    def read(self, ids: np.ndarray) -> torch.Tensor:
        """A copy of the pages ``ids`` on the pool's device, uint8 ``[len(ids), record_bytes]``."""
        return self.memory.read(ids)

    def addresses(self, ids: np.ndarray) -> np.ndarray:
        """The byte address of each of the used pages ``ids``, of any shape; valid as long as it keeps a reference."""
        return self.memory.addresses(ids)

    def slabs(self) -> list[torch.Tensor]:
        """The tensors in which pages lie, uint8 ``[n, record_bytes]``."""
        return [slab.records for _, slab in self.memory.live()]

    def check(self) -> None:
        """Raise IntegrityError unless free and used pages add up and the references are those of the tables."""
        with self._lock:
            self._check()

    def _check(self) -> None:
        held = np.concatenate([np.zeros(0, np.int64), *self._live_ids()])
        used = held[self._references[held] > 0]
        if len(used) + len(self._free) != len(held):
            raise IntegrityError(f"{len(used)} used + {len(self._free)} free pages != {len(held)} held")
        if len(np.unique(self._free)) != len(self._free) or self._references[self._free].any():
            raise IntegrityError("the free list repeats a page or holds a used one")
        counted = np.zeros_like(self._references)
        for holder in self._holders:
            np.add.at(counted, holder.page_ids(), 1)
        if not np.array_equal(counted, self._referring()):
            raise IntegrityError("the reference counts are not those of the tables")
        if any(self._references[page] == 0 for page in self.positions):
            raise IntegrityError("positions are stored for a free page")

    def _reserve(self, count: int) -> None:
        if len(self._free) < count:
            ids = self.memory.add(count - len(self._free))
            self._extend()
            self._free = np.sort(np.concatenate([self._free, ids])) if len(self._free) else ids

    def _extend(self) -> None:
        """Room for the references to all page ids."""
        more = self.memory.total - len(self._references)
        if more:
            new = np.zeros(more, dtype=np.int32)
            self._references, self._editions = (np.concatenate([x, new]) for x in (self._references, self._editions))

    def _drop_empty_slabs(self, freed: np.ndarray) -> None:
        for index in np.unique(self.memory.owner(freed)).tolist():
            start, stop = self.memory.range_of(index)
            if not self._references[start:stop].any():
                self.memory.drop(index)
                self._free = self._free[(self._free < start) | (self._free >= stop)]

    def _referring(self) -> np.ndarray:
        """References of each page, without those of tables that are gone and not yet released."""
        references = self._references.copy()
        for ids in list(self._abandoned):
            np.subtract.at(references, ids, 1)
        return references

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            self._release_abandoned()
            yield

    def _release_abandoned(self) -> None:
        while self._abandoned:
            self._release(self._abandoned.popleft())

    def _live_ids(self) -> Iterator[np.ndarray]:
        return (np.arange(*self.memory.range_of(index)) for index, _ in self.memory.live())
