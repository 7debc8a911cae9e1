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
from hf_kvcache.storage.transfers import is_run, rows_of, to_device

#: A new slab holds at least this fraction of the pages there are: few slabs, little slack.
_GROWTH = 1 / 64


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
        device: where pages live.
    """

    def __init__(self, record_bytes: int, device: torch.device) -> None:
        self.record_bytes = record_bytes
        self.device = device
        self._slabs: list[torch.Tensor | None] = []
        self._starts = np.zeros(0, dtype=np.int64)  # first page id of each slab, ascending
        self._bases = np.zeros(0, dtype=np.int64)  # address of each slab
        self._sizes: list[int] = []
        self._references = np.zeros(0, dtype=np.int32)
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
            return self._held()

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

    def add_holder(self, holder: PageHolder) -> None:
        """Make a table known to :meth:`check`; held weakly."""
        with self._locked():
            self._holders.add(holder)

    def allocate(self, count: int) -> np.ndarray:
        """``count`` ascending page ids with one reference each, whose contents are not yet written."""
        with self._locked():
            if len(self._free) < count:
                self._add_slab(count - len(self._free))
            ids, self._free = self._free[:count], self._free[count:]
            self._references[ids] = 1
        return ids

    def adopt(self, records: torch.Tensor) -> np.ndarray:
        """Make uint8 ``records [n, record_bytes]``, on the pool's device, pages without copying them.

        The pool writes into the tensor once a page of it is free, so nobody else may read or write it.

        Returns:
            The page ids, ascending, with one reference each.
        """
        if records.shape[1:] != (self.record_bytes,) or not records.is_contiguous() or records.dtype != torch.uint8:
            raise ValueError(f"records {records.dtype} {list(records.shape)}; accepted: uint8 [n, {self.record_bytes}]")
        with self._locked():
            if len(records) == 0:
                return np.zeros(0, dtype=np.int64)
            index = self._vacant_slab(len(records))
            start = int(self._starts[index])
            self._slabs[index], self._bases[index] = records, records.data_ptr()
            ids = np.arange(start, start + len(records))
            self._references[ids] = 1
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
        """Store uint8 ``records [n, record_bytes]`` in the pages ``ids``."""
        for slab, slots, where in self._by_slab(ids):
            rows = records if len(where) == len(ids) else rows_of(records, where)
            if is_run(slots):
                slab[int(slots[0]) : int(slots[-1]) + 1] = rows
            else:
                slab[self._sent(slots)] = rows

    def read(self, ids: np.ndarray) -> torch.Tensor:
        """A copy of the pages ``ids``, uint8 ``[len(ids), record_bytes]``."""
        parts = list(self._by_slab(ids))
        if len(parts) == 1:
            slab, slots, _ = parts[0]
            return slab[int(slots[0]) : int(slots[-1]) + 1].clone() if is_run(slots) else slab[self._sent(slots)]
        out = torch.empty(len(ids), self.record_bytes, dtype=torch.uint8, device=self.device)
        # Sent at once: slots, and the places that they take.
        pairs = [np.stack([slots, where]) for _, slots, where in parts] or [np.zeros((2, 0), np.int64)]
        both = np.concatenate(pairs, 1)
        index = self._sent(both).split([len(slots) for _, slots, _ in parts], 1)
        for (slab, _, _), (slots, where) in zip(parts, index, strict=True):
            out[where] = slab[slots]
        return out

    def addresses(self, ids: np.ndarray) -> np.ndarray:
        """The byte address of each of the used pages ``ids``, of any shape; valid as long as it keeps a reference."""
        owner = np.searchsorted(self._starts, ids, side="right") - 1
        return self._bases[owner] + (ids - self._starts[owner]) * self.record_bytes

    def side_by_side(self, ids: np.ndarray) -> torch.Tensor | None:
        """The pages ``ids``, uint8 ``[len(ids), record_bytes]``, as a view; None unless they lie so in one slab."""
        index = int(np.searchsorted(self._starts, ids[0], side="right")) - 1
        slab, first = self._slabs[index], int(ids[0] - self._starts[index])
        assert slab is not None
        if first + len(ids) > slab.shape[0] or not bool((np.diff(ids) == 1).all()):
            return None
        return slab[first : first + len(ids)]

    def slabs(self) -> list[torch.Tensor]:
        """The tensors in which pages lie, uint8 ``[n, record_bytes]``."""
        return [slab for slab in self._slabs if slab is not None]

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

    @torch.inference_mode(False)
    def _add_slab(self, count: int) -> None:
        count = max(count, int(self._held() * _GROWTH))
        index = self._vacant_slab(count)
        start = int(self._starts[index])
        slab = torch.empty(count, self.record_bytes, dtype=torch.uint8, device=self.device)
        self._slabs[index], self._bases[index] = slab, slab.data_ptr()
        self._free = np.sort(np.concatenate([self._free, np.arange(start, start + count)]))

    def _vacant_slab(self, count: int) -> int:
        """The index of a slab of ``count`` pages without memory: one that was given back, or a new one."""
        for index, (slab, size) in enumerate(zip(self._slabs, self._sizes, strict=True)):
            if slab is None and size == count:
                return index
        self._slabs.append(None)
        self._sizes.append(count)
        self._starts = np.append(self._starts, len(self._references))
        self._bases = np.append(self._bases, 0)
        self._references = np.concatenate([self._references, np.zeros(count, dtype=np.int32)])
        return len(self._slabs) - 1

    def _drop_empty_slabs(self, freed: np.ndarray) -> None:
        for index in np.unique(np.searchsorted(self._starts, freed, side="right") - 1).tolist():
            slab, start = self._slabs[index], int(self._starts[index])
            assert slab is not None
            stop = start + slab.shape[0]
            if not self._references[start:stop].any():
                self._slabs[index] = None
                self._free = self._free[(self._free < start) | (self._free >= stop)]

    def _referring(self) -> np.ndarray:
        """References of each page, without those of tables that are gone and not yet released."""
        references = self._references.copy()
        for ids in list(self._abandoned):
            np.subtract.at(references, ids, 1)
        return references

    def _held(self) -> int:
        return sum(slab.shape[0] for slab in self._slabs if slab is not None)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            self._release_abandoned()
            yield

    def _release_abandoned(self) -> None:
        while self._abandoned:
            self._release(self._abandoned.popleft())

    def _live_ids(self) -> Iterator[np.ndarray]:
        for slab, start in zip(self._slabs, self._starts.tolist(), strict=True):
            if slab is not None:
                yield np.arange(start, start + slab.shape[0])

    def _sent(self, numbers: np.ndarray) -> torch.Tensor:
        return to_device(numbers, self.device)

    def _by_slab(self, ids: np.ndarray) -> Iterator[tuple[torch.Tensor, np.ndarray, np.ndarray]]:
        """For each slab that holds some of ``ids``: the slab, the slots in it and their places in ``ids``."""
        owner = np.searchsorted(self._starts, ids, side="right") - 1
        for index in np.unique(owner).tolist():
            where = np.flatnonzero(owner == index)
            slab = self._slabs[index]
            assert slab is not None
            yield slab, ids[where] - self._starts[index], where
