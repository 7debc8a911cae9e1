"""Fetching pages from outside of a device: the pages of a layer are copied into a buffer, while the layer before runs.

A device has two buffers, each of the size of a layer's pages. Layers take turns: the pages of one are read from the
first buffer, while those of the next are copied to the second. On a GPU copies run on a stream of their own. **This was
never run on a GPU.**
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from hf_kvcache.storage.page_table import PageTable
from hf_kvcache.storage.slabs import Slab, SlabSource

#: Bytes of pinned memory through which what lies in files goes to a GPU; there are two such pieces.
_STAGING = 1 << 24
_NO_VERSION = -1


class Buffer:
    """Memory on a device for the pages of one layer at a time.

    Attributes:
        memory: uint8 ``[n]``; replaced by a larger one when it has to hold more.
        version: version of the page table whose pages it holds; -1 for none.
        copied: an event on the stream of the copies, behind the latest copy to the buffer; None without streams.
        reader: the stream that reads what it holds.
    """

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)
        self.version = _NO_VERSION
        self.copied: Any = None
        self.reader: Any = None


class DeviceBuffers:
    """The two buffers of a device, and the stream of the copies to them. A thread has buffers of its own.

    Args:
        device: where the buffers lie.
    """

    @torch.inference_mode(False)
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pair = Buffer(device), Buffer(device)
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._staging: list[tuple[torch.Tensor, Any]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers."""
        return sum(buffer.memory.numel() for buffer in self.pair)

    @torch.inference_mode(False)
    def fill(self, buffer: Buffer, parts: list[tuple[Slab, int, int, int]], version: int) -> None:
        """Begin to copy parts of slabs into a buffer, side by side.

        The copies begin when the work that is queued on the current stream is done, which may write pages, and what is
        queued on the stream that reads what the buffer holds now.

        Args:
            buffer: one of the pair.
            parts: as :meth:`hf_kvcache.storage.slabs.Slabs.spans` returns them.
            version: of the page table whose pages these are.
        """
        buffer.version = _NO_VERSION
        size = sum((last - first) * slab.records.shape[1] for slab, first, last, _ in parts)
        if buffer.memory.numel() < size:
            self._grow(buffer, size)
        if self._stream is None:
            self._copy(buffer.memory, parts)
        else:
            current = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(current)
            if buffer.reader not in (None, current):
                self._stream.wait_stream(buffer.reader)
            with torch.cuda.stream(self._stream):
                self._copy(buffer.memory, parts)
                buffer.copied = torch.cuda.Event()
                buffer.copied.record(self._stream)
        buffer.version = version

    def wait(self, buffer: Buffer) -> None:
        """Let the current stream wait for the copies to a buffer; the host does not wait."""
        if buffer.copied is not None:
            buffer.reader = torch.cuda.current_stream(self.device)
            buffer.reader.wait_event(buffer.copied)

    def _grow(self, buffer: Buffer, size: int) -> None:
        more = max(size, buffer.memory.numel() * 3 // 2)
        buffer.memory = torch.empty(more, dtype=torch.uint8, device=self.device)
        if self._stream is not None:
            # Copies may still write to it when it is freed, on a stream that the allocator does not know of: when it is
            # replaced, and when a cache or a thread ends while the next layer's pages are on their way.
            buffer.memory.record_stream(self._stream)

    def _copy(self, memory: torch.Tensor, parts: list[tuple[Slab, int, int, int]]) -> None:
        start = 0
        for slab, first, last, _ in parts:
            source = slab.records[first:last].flatten()
            target = memory[start : start + source.numel()]
            if self._stream is None or slab.pinned:
                target.copy_(source, non_blocking=slab.pinned)
            else:
                self._copy_staged(target, source)
            start += source.numel()

    def _copy_staged(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy from a mapped file through pinned memory, so that only the reading of the file keeps the host."""
        if not self._staging:
            self._staging = [
                (torch.empty(_STAGING, dtype=torch.uint8, device="cpu", pin_memory=True), torch.cuda.Event())
                for _ in range(2)
            ]
        for start in range(0, source.numel(), _STAGING):
            stop = min(start + _STAGING, source.numel())
            piece, done = self._staging.pop(0)
            done.synchronize()  # the piece may still be on its way
            piece[: stop - start].copy_(source[start:stop])
            target[start:stop].copy_(piece[: stop - start], non_blocking=True)
            done.record(self._stream)
            self._staging.append((piece, done))


@dataclass(eq=False)
class Fetched:
    """Pages that lie in a buffer of the device.

    Attributes:
        records: uint8 ``[n, record_bytes]``, the buffer as far as these pages take it up.
        addresses: int64 ``[rows, columns]``, of the records; 0 where a row has no page.
        version: version of the page table that says which pages these are.
        memory: the memory of the buffer.
    """

    records: torch.Tensor
    addresses: np.ndarray
    version: int
    memory: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the addresses."""
        return self.addresses.strides[0] * len(self.addresses)


class PageSource(SlabSource, Protocol):
    """Where pages lie outside of a device."""

    def buffers(self, device: torch.device) -> DeviceBuffers:
        """This thread's buffers on ``device``."""

    def reads_disk(self) -> bool:
        """Whether pages that are read in place may have to come from a disk first."""


class PageFetch:
    """Brings the pages of one storage to the device.

    Args:
        target: where pages lie.
        place: the number of the layer among those that offload. Layers next to each other take different buffers.
        device: of the layer.
    """

    def __init__(self, target: PageSource, place: int, device: torch.device) -> None:
        self.target, self.place, self.device = target, place, device
        self.in_place = target.in_place(device)
        #: Bytes that were copied to the buffers so far.
        self.copied = 0
        self._fetched: Fetched | None = None
        # Which parts of which slabs hold the pages, and of which version of the table.
        self._parts: list[tuple[Slab, int, int, int]] = []
        self._parts_version = _NO_VERSION

    @property
    def nbytes(self) -> int:
        """Bytes of bookkeeping."""
        return 0 if self._fetched is None else self._fetched.nbytes

    def fork(self) -> PageFetch:
        """The same for a fork of the storage."""
        return PageFetch(self.target, self.place, self.device)

    def begin(self, table: PageTable) -> None:
        """Begin to fetch the pages of ``table``, without waiting for them."""
        if self.in_place:
            for slab, first, last, _ in self._spans(table):
                slab.advise(mmap.MADV_WILLNEED, first, last)
            return
        buffers = self.target.buffers(self.device)
        buffer = buffers.pair[self.place % 2]
        if buffer.version != table.version and table.columns:
            parts = self._spans(table)
            buffers.fill(buffer, parts, table.version)
            self.copied += sum((last - first) * slab.records.shape[1] for slab, first, last, _ in parts)

    def ahead(self, table: PageTable) -> None:
        """:meth:`begin` a layer ahead, unless the pages are read in place and lie in memory anyway."""
        if not self.in_place or self.target.reads_disk():
            self.begin(table)

    def bring(self, table: PageTable) -> Fetched | None:
        """The pages of ``table`` on the device, for work that is queued on the current stream from now on.

        They stay there until another storage with a place of the same parity fetches its pages. As long as nothing
        changes, the result is the same object.

        Returns:
            None if the pages are read where they lie, or there are none.
        """
        if self.in_place or table.columns == 0:
            return None
        self.begin(table)
        buffers = self.target.buffers(self.device)
        buffer, fetched = buffers.pair[self.place % 2], self._fetched
        buffers.wait(buffer)
        if fetched is None or fetched.version != table.version or fetched.memory is not buffer.memory:
            fetched = self._fetched = self._found(table, buffer.memory)
        return fetched

    def leave(self, table: PageTable) -> None:
        """Let go of the pages of ``table`` until they are needed again."""
        if self.in_place:
            for slab, first, last, _ in self._spans(table):
                # They are no longer mapped; the system keeps them as long as it has room, and reads them again else.
                slab.advise(mmap.MADV_DONTNEED, first, last)
            return
        buffer = self.target.buffers(self.device).pair[self.place % 2]
        if buffer.version == table.version:
            buffer.version = _NO_VERSION

    def _spans(self, table: PageTable) -> list[tuple[Slab, int, int, int]]:
        if self._parts_version != table.version:
            self._parts, self._parts_version = table.pool.memory.spans(table.page_ids()), table.version
        return self._parts

    def _found(self, table: PageTable, memory: torch.Tensor) -> Fetched:
        """Where the pages of ``table`` lie in ``memory``. The table on the device is told which columns have moved."""
        ids, slabs = table.export()[0], table.pool.memory
        parts, held = self._spans(table), ids >= 0
        sizes = np.array([last - first for _, first, last, _ in parts])
        # As far apart as the rows of the table's own arrays, which kernels read beside this one.
        width = table.arrays(0)[1].strides[0] // np.dtype(np.int32).itemsize
        addresses = np.zeros((len(ids), width), dtype=np.int64)[:, : ids.shape[1]]
        addresses[held] = memory.data_ptr() + _places(ids[held], parts, sizes) * slabs.record_bytes
        old = self._fetched
        table.resident.note(table.version, 0 if old is None else _first_difference(old.addresses, addresses))
        count = int(sizes.sum())
        records = memory[: count * slabs.record_bytes].view(count, slabs.record_bytes)
        return Fetched(records, addresses, table.version, memory)


def _places(ids: np.ndarray, parts: list[tuple[Slab, int, int, int]], sizes: np.ndarray) -> np.ndarray:
    """The places of the pages ``ids [n]`` among the pages of all ``parts``, side by side."""
    firsts = np.array([first for *_, first in parts])
    part = np.searchsorted(firsts, ids, side="right") - 1
    return ids - firsts[part] + (np.cumsum(sizes) - sizes)[part]


def _first_difference(old: np.ndarray, new: np.ndarray) -> int:
    """The first column in which two tables differ; 0 if they have different rows."""
    columns = min(old.shape[1], new.shape[1])
    if len(old) != len(new):
        return 0
    differ = (old[:, :columns] != new[:, :columns]).any(0)
    return int(differ.argmax()) if differ.any() else columns
