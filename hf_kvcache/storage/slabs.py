"""The memory of pages: slabs that never move, on the device that reads the pages or outside of it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from hf_kvcache.storage.transfers import is_run, rows_of, to_device

#: A new slab holds at least this fraction of the pages there are: few slabs, little slack.
_GROWTH = 1 / 64
#: The same outside of the device, where each slab is a transfer of its own.
_GROWTH_OUTSIDE = 1 / 8
#: Pages that may be sent to the device to read one of them there; where it would be more, the host picks them out.
_MOST_BESIDE = 2


@dataclass(eq=False)
class Slab:
    """Memory of some pages.

    Attributes:
        records: uint8 ``[pages, record_bytes]``.
        path: the mapped file that the records lie in; None if they lie in memory.
        pinned: whether a GPU copies from and to the memory without the host waiting for it.
    """

    records: torch.Tensor
    path: Path | None = None
    pinned: bool = False

    def advise(self, advice: int, first: int, last: int) -> None:
        """Tell the operating system what becomes of pages ``[first, last)`` of a mapped file (``mmap.MADV_...``)."""
        if self.path is None:
            return
        record_bytes = self.records.shape[1]
        start = first * record_bytes // mmap.PAGESIZE * mmap.PAGESIZE  # a mapping begins at a multiple of this
        if _libc().madvise(self.records.data_ptr() + start, last * record_bytes - start, advice):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def drop(self) -> None:
        """Delete the file. The memory goes with the last tensor that refers to it."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class SlabSource(Protocol):
    """Makes slabs outside of a device; :mod:`hf_kvcache.storage.offload` has those that there are."""

    def in_place(self, device: torch.device) -> bool:
        """Whether what computes on ``device`` can read and write the slabs."""

    def slabs(self, pages: int, record_bytes: int, device: torch.device) -> list[Slab]:
        """Memory for at least so many pages, which are read on ``device``; raises OSError if there is none."""


class Slabs:
    """Slabs by ranges of page ids. A slab whose pages are all free has no memory.

    Args:
        record_bytes: bytes of a page.
        device: where pages are made and read.
        target: where the slabs lie outside of the device; None if they lie on it.

    Attributes:
        total: number of page ids, of slabs without memory too.
        held: number of pages that have memory.
    """

    def __init__(self, record_bytes: int, device: torch.device, target: SlabSource | None) -> None:
        self.record_bytes, self.device, self.target = record_bytes, device, target
        self.total = self.held = 0
        self._slabs: list[Slab | None] = []
        self._starts = np.zeros(0, dtype=np.int64)  # first page id of each slab, ascending
        self._bases = np.zeros(0, dtype=np.int64)  # address of each slab
        self._sizes: list[int] = []

    @property
    def in_place(self) -> bool:
        """Whether what computes on the device can read and write the slabs."""
        return self.target is None or self.target.in_place(self.device)

    def add(self, count: int) -> np.ndarray:
        """Memory for at least ``count`` pages; returns their ids, ascending."""
        growth = _GROWTH if self.target is None else _GROWTH_OUTSIDE
        count = max(count, int(self.held * growth))
        if self.target is None:
            with torch.inference_mode(False):
                records = torch.empty(count, self.record_bytes, dtype=torch.uint8, device=self.device)
            return self.adopt(Slab(records))
        with torch.inference_mode(False):
            slabs = self.target.slabs(count, self.record_bytes, self.device)
        return np.sort(np.concatenate([self.adopt(slab) for slab in slabs]))

    def adopt(self, slab: Slab) -> np.ndarray:
        """Take a slab in; returns the ids of its pages, ascending."""
        count = slab.records.shape[0]
        index = self._vacant(count)
        self._slabs[index], self._bases[index] = slab, slab.records.data_ptr()
        self.held += count
        start = int(self._starts[index])
        return np.arange(start, start + count)

    def drop(self, index: int) -> None:
        """Give the memory of a slab back."""
        slab = self._slabs[index]
        assert slab is not None
        self._slabs[index] = None
        self.held -= self._sizes[index]
        slab.drop()

    def owner(self, ids: np.ndarray) -> np.ndarray:
        """The index of the slab of each of ``ids``, of any shape."""
        return np.searchsorted(self._starts, ids, side="right") - 1

    def range_of(self, index: int) -> tuple[int, int]:
        """First page id of a slab, and the one behind its last."""
        start = int(self._starts[index])
        return start, start + self._sizes[index]

    def live(self) -> Iterator[tuple[int, Slab]]:
        """The slabs that have memory, with their indices."""
        for index, slab in enumerate(self._slabs):
            if slab is not None:
                yield index, slab

    def addresses(self, ids: np.ndarray) -> np.ndarray:
        """The byte address of each of the used pages ``ids``, of any shape."""
        owner = self.owner(ids)
        return self._bases[owner] + (ids - self._starts[owner]) * self.record_bytes

    def spans(self, ids: np.ndarray) -> list[tuple[Slab, int, int, int]]:
        """The parts of slabs that hold the used pages ``ids [n]``.

        Returns:
            For each slab: itself, the first of its pages that is wanted, the one behind the last that is, and the id
            of the first.
        """
        owner, found = self.owner(ids), []
        for index in np.unique(owner).tolist():
            of_slab, slab, start = ids[owner == index], self._slabs[index], int(self._starts[index])
            assert slab is not None
            first, last = int(of_slab.min()), int(of_slab.max()) + 1
            found.append((slab, first - start, last - start, first))
        return found

    def side_by_side(self, ids: np.ndarray) -> torch.Tensor | None:
        """The pages ``ids``, uint8 ``[len(ids), record_bytes]``, as a view; None unless they lie so in one slab."""
        index = int(self.owner(ids[0]))
        slab, first = self._slabs[index], int(ids[0] - self._starts[index])
        assert slab is not None
        if first + len(ids) > slab.records.shape[0] or not bool((np.diff(ids) == 1).all()):
            return None
        return slab.records[first : first + len(ids)]

    def write(self, ids: np.ndarray, records: torch.Tensor) -> None:
        """Store ``records [n, record_bytes]``, on the device, in the pages ``ids``."""
        for slab, slots, where in self._by_slab(ids):
            rows, into = records if len(where) == len(ids) else rows_of(records, where), slab.records
            outside = into.device != self.device
            if is_run(slots):
                span = slice(int(slots[0]), int(slots[-1]) + 1)
                if outside:
                    into[span].copy_(rows, non_blocking=slab.pinned)
                else:
                    into[span] = rows
            elif outside:
                # Waits for the device, so that no earlier write to these slots is still under way.
                into[torch.from_numpy(slots)] = rows.cpu()
            else:
                into[to_device(slots, self.device)] = rows

    def read(self, ids: np.ndarray) -> torch.Tensor:
        """A copy of the pages ``ids`` on the device, uint8 ``[len(ids), record_bytes]``."""
        return self._read(ids, self.device)

    def gathered(self, ids: np.ndarray) -> torch.Tensor:
        """A copy of the pages ``ids`` on the device, sent there at once and nothing beside them.

        The host copies them together first. A GPU may still be writing pages to where they lie, so this waits for it.
        """
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.current_stream(self.device).synchronize()
        shape = len(ids), self.record_bytes
        together = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=cuda)
        for slab, slots, where in self._by_slab(ids):
            # Eight bytes at a time: records are aligned to 16.
            picked = slab.records.view(torch.int64).index_select(0, torch.from_numpy(slots))
            together.view(torch.int64)[torch.from_numpy(where)] = picked
        return together.to(self.device, non_blocking=True)

    def read_outside(self, ids: np.ndarray) -> torch.Tensor:
        """A copy of the pages ``ids`` where they lie: in the host's memory, unless they lie on the device."""
        if self.target is None:
            return self.read(ids)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # pages may still be on their way there
        return self._read(ids, torch.device("cpu"))

    def _read(self, ids: np.ndarray, device: torch.device) -> torch.Tensor:
        if self.target is not None and device == self.device and len(ids):
            beside = sum(last - first for _, first, last, _ in self.spans(ids))
            if beside > _MOST_BESIDE * len(ids) and not self.in_place:
                return self.gathered(ids)
        parts = [self._on_device(*part, device) for part in self._by_slab(ids)]
        if len(parts) == 1:
            part, slots, _ = parts[0]
            run = is_run(slots)
            return part[int(slots[0]) : int(slots[-1]) + 1].clone() if run else part[to_device(slots, device)]
        out = torch.empty(len(ids), self.record_bytes, dtype=torch.uint8, device=device)
        # Sent at once: slots, and the places that they take.
        pairs = [np.stack([slots, where]) for _, slots, where in parts] or [np.zeros((2, 0), np.int64)]
        index = to_device(np.concatenate(pairs, 1), device).split([len(slots) for _, slots, _ in parts], 1)
        for (part, _, _), (slots, where) in zip(parts, index, strict=True):
            out[where] = part[slots]
        return out

    @staticmethod
    def _on_device(
        slab: Slab, slots: np.ndarray, where: np.ndarray, device: torch.device
    ) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """A slab as far as its ``slots`` reach, on a device, and the slots in that part of it."""
        if slab.records.device == device:
            return slab.records, slots, where
        first, last = int(slots.min()), int(slots.max()) + 1
        # Queued behind the writes of these pages, which a look at them from the host would not wait for.
        return slab.records[first:last].to(device, non_blocking=slab.pinned), slots - first, where

    def _vacant(self, count: int) -> int:
        """The index of a slab of ``count`` pages without memory: one that was given back, or a new one."""
        if self.held < self.total:
            for index, (slab, size) in enumerate(zip(self._slabs, self._sizes, strict=True)):
                if slab is None and size == count:
                    return index
        self._slabs.append(None)
        self._sizes.append(count)
        self._starts = np.concatenate((self._starts, (self.total,)))
        self._bases = np.concatenate((self._bases, (0,)))
        self.total += count
        return len(self._slabs) - 1

    def _by_slab(self, ids: np.ndarray) -> Iterator[tuple[Slab, np.ndarray, np.ndarray]]:
        """For each slab that holds some of ``ids``: itself, the slots in it and their places in ``ids``."""
        owner = self.owner(ids)
        for index in np.unique(owner).tolist():
            where = np.flatnonzero(owner == index)
            slab = self._slabs[index]
            assert slab is not None
            yield slab, ids[where] - self._starts[index], where


@cache
def _libc() -> Any:
    """The C library, for mappings of torch, which keep no file open and have no method for advice."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return libc
