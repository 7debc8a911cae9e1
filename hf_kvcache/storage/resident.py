"""The pages that sparse reading needs, on a device that cannot read them where they lie."""

from __future__ import annotations

import numpy as np
import torch

from hf_kvcache.storage.page_table import PageTable, ids_at
from hf_kvcache.storage.transfers import to_device

#: Room beyond the pages of a step, as a share of these: for pages of earlier steps, which a later one may pick again.
_SPARE = 1 / 4
_NONE = -1


class ResidentPages:
    """Pages of one storage in memory of the device. A step brings those of its pages that are not there yet.

    Pages that a step does not need make room for those that it does, the longest unused ones first. Pages are known by
    their ids in the pool, so they stay through page events, crops and reordering, and rows that share a page share it
    here. **This was never run on a GPU.**

    Args:
        device: which reads the pages.
        record_bytes: bytes of a page.

    Attributes:
        records: uint8 ``[slots, record_bytes]``; replaced by a larger tensor when a step needs more pages.
        copied: bytes that were copied to the device so far.
    """

    @torch.inference_mode(False)
    def __init__(self, device: torch.device, record_bytes: int) -> None:
        self.records = torch.empty(0, record_bytes, dtype=torch.uint8, device=device)
        self.copied = 0
        self.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of memory on the device."""
        return self.records.numel()

    def clear(self) -> None:
        """Forget the pages."""
        slots = len(self.records)
        self._ids = np.full(slots, _NONE, dtype=np.int64)  # the page in each slot
        self._editions = np.zeros(slots, dtype=np.int32)  # which page of that id: ids are given out again
        self._used = np.zeros(slots, dtype=np.int64)  # the number of the latest step that needed it
        self._step = 0

    def bring(self, table: PageTable, columns: np.ndarray) -> np.ndarray:
        """Have some pages of ``table`` on the device, for what is queued on the current stream before the next call.

        Args:
            table: which pages there are.
            columns: int64 ``[rows, n]``, columns of each row.

        Returns:
            The addresses of their records, int64 ``[rows, n]``; 0 where a row has no page.
        """
        ids = ids_at(table, columns)
        held = ids != _NONE
        wanted, place = np.unique(ids[held], return_inverse=True)
        slots = self._slots_of(wanted, table.pool.editions(wanted))
        missing = slots == _NONE
        self._step += 1
        self._used[slots[~missing]] = self._step
        if missing.any():
            slots[missing] = self._fill(table, wanted[missing], len(wanted))
        addresses = np.zeros(ids.shape, dtype=np.int64)
        addresses[held] = self.records.data_ptr() + slots[place.reshape(-1)] * self.records.shape[1]
        return addresses

    def _slots_of(self, wanted: np.ndarray, editions: np.ndarray) -> np.ndarray:
        """The slot of each of the pages ``wanted``; -1 for those that are not here."""
        slots = np.full(len(wanted), _NONE, dtype=np.int64)
        filled = np.flatnonzero(self._ids != _NONE)
        _, there, here = np.intersect1d(wanted, self._ids[filled], assume_unique=True, return_indices=True)
        here = filled[here]
        same = self._editions[here] == editions[there]
        slots[there[same]] = here[same]
        self._ids[here[~same]] = _NONE
        return slots

    @torch.inference_mode(False)
    def _fill(self, table: PageTable, ids: np.ndarray, pages: int) -> np.ndarray:
        """Copy pages into slots that the current step, which needs so many ``pages``, does not use."""
        if pages > len(self.records):
            self._grow(pages + int(pages * _SPARE))
        free = np.flatnonzero(self._used < self._step)
        # Empty slots first, then those that were used longest ago.
        age = np.where(self._ids[free] == _NONE, _NONE, self._used[free])
        slots = np.sort(free[np.argsort(age, kind="stable")[: len(ids)]])
        self._ids[slots] = _NONE  # until the copy is under way: it may be interrupted
        records = table.pool.memory.gathered(ids)
        self.records[to_device(slots, self.records.device)] = records
        self._ids[slots], self._editions[slots], self._used[slots] = ids, table.pool.editions(ids), self._step
        self.copied += records.numel()
        return slots

    def _grow(self, slots: int) -> None:
        held, record_bytes = self.records.shape
        records = torch.empty(slots, record_bytes, dtype=torch.uint8, device=self.records.device)
        records[:held] = self.records
        self.records = records
        more = slots - held
        self._ids = np.pad(self._ids, (0, more), constant_values=_NONE)
        self._editions, self._used = np.pad(self._editions, (0, more)), np.pad(self._used, (0, more))
