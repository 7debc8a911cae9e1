"""Storing of tokens in the tensors of a layer with a fixed maximum length, by functions on the host.

What is packed, and when, is the same as in :mod:`hf_kvcache.storage`.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

import numpy as np
import torch

from hf_kvcache.kernels.static_state import FIRST, GAPS, LAST, MEAN_KNOWN
from hf_kvcache.layers.static_packing import StaticPacking
from hf_kvcache.layers.static_steps import StaticSteps
from hf_kvcache.layers.static_tensors import StaticSettings, StaticTensors
from hf_kvcache.storage.transfers import to_device


class StaticStorage(StaticPacking):
    """The tensors of one layer, as functions on the host read and change them.

    Args:
        tensors: the state.
        settings: for which it was allocated.
    """

    def __init__(self, tensors: StaticTensors, settings: StaticSettings) -> None:
        super().__init__(tensors, settings)
        self.steps = StaticSteps()
        # If the next token has this position, those before it stand side by side; -1: ask the counters.
        self._follows = -1

    def changed(self) -> None:
        """Take note that the tensors were changed otherwise than by the methods here, or that pages were."""
        self._follows = -1
        self.steps.forget()

    def clear(self) -> None:
        """Forget all tokens."""
        self.numbers.clear()
        self.unbalance()
        self.changed()

    # -- storing --------------------------------------------------------------------------------------------------

    def store(self, keys: torch.Tensor, values: torch.Tensor, valid: np.ndarray | None) -> None:
        """Store ``T`` tokens ``[B, H, T, D]``, but for those that ``valid [B, T]`` marks as padding, and pack them."""
        if keys.shape[2] > 1:
            self.store_block(keys, values, valid)
            return
        one = None if valid is None else valid[:, 0]
        self.put_one(keys, values, one)
        self.finish_one(one)

    def put_one(self, keys: torch.Tensor, values: torch.Tensor, valid: np.ndarray | None) -> None:
        """Write a token ``[B, H, 1, D]`` of each sequence that ``valid [B]`` does not mark as padding; count it later.

        :meth:`finish_one` counts it and packs what is due.
        """
        dense, lengths = self.tensors, self.lengths
        if valid is None and lengths.min() == lengths.max():
            slot = int(lengths[0])
            dense.dense_keys.select(2, slot).copy_(keys.select(2, 0))
            dense.dense_values.select(2, slot).copy_(values.select(2, 0))
            self.numbers.positions[:, slot] = self.seen
            return
        rows = np.arange(self.batch) if valid is None else np.flatnonzero(valid)
        slots = lengths[rows]
        row_index, slot_index = (to_device(each, keys.device) for each in (rows, slots))
        dense.dense_keys[row_index, :, slot_index] = keys[row_index, :, 0]
        dense.dense_values[row_index, :, slot_index] = values[row_index, :, 0]
        self.numbers.positions[rows, slots] = self.seen

    def finish_one(self, valid: np.ndarray | None) -> None:
        """Count the token that :meth:`put_one` wrote, and pack the pages that are due."""
        rows = np.arange(self.batch) if valid is None else np.flatnonzero(valid)
        self._note_places(rows, np.full((len(rows), 1), self.seen))
        self.lengths[rows] += 1
        self._follows = -1
        self._commit_one()

    def finish_step(self) -> None:
        """:meth:`finish_one` of a token that is no padding in any row, whose slot is counted."""
        seen = self.seen
        if self._follows == seen:
            self.numbers.counters[LAST] = seen
        else:
            self._note_places(np.arange(self.batch), np.full((self.batch, 1), seen))
        self._follows = seen + 1
        self._commit_one()

    def _commit_one(self) -> None:
        """Count one more token as seen, pack the pages that are due, and drop those outside of the window."""
        self.numbers.seen += 1
        keep_from = self.settings.start(self.seen)
        if self.lengths.max() == self.slots:
            due = np.flatnonzero(self.lengths == self.slots)
            start, stop = self.settings.sink_length, self.settings.sink_length + self.page_size
            every = slice(None) if len(due) == self.batch else to_device(due, self.tensors.state.device)
            keys, values = (x[every, :, start:stop] for x in (self.tensors.dense_keys, self.tensors.dense_values))
            self._pack(due, keys, values, self.numbers.positions[due, start:stop], keep_from)
            self._drop_packed(every, due, start, stop)
        if keep_from:
            self._drop_before(keep_from)
        self.numbers.write()

    def store_block(self, keys: torch.Tensor, values: torch.Tensor, valid: np.ndarray | None) -> None:
        """:meth:`store` of several tokens of each sequence."""
        length, lengths = keys.shape[2], self.lengths
        positions = np.arange(self.seen, self.seen + length)
        keep_from = self.settings.start(self.seen + length)
        self._drop_before(keep_from)
        if valid is None and lengths.min() == lengths.max():
            self._store_rows(np.arange(self.batch), keys, values, positions, keep_from)
        else:
            for row in range(self.batch):
                held = np.arange(length) if valid is None else np.flatnonzero(valid[row])
                index, one = to_device(held, keys.device), slice(row, row + 1)
                new = keys[one][:, :, index], values[one][:, :, index]
                self._store_rows(np.array([row]), *new, positions[held], keep_from)
        self.numbers.seen += length
        self._follows = -1
        self.numbers.write()

    def _store_rows(
        self, rows: np.ndarray, keys: torch.Tensor, values: torch.Tensor, positions: np.ndarray, keep_from: int
    ) -> None:
        """Store tokens of sequences that hold equally many in the dense buffer."""
        span, held = slice(int(rows[0]), int(rows[-1]) + 1), int(self.lengths[rows[0]])
        at = np.broadcast_to(positions, (len(rows), len(positions)))
        self._note_places(rows, at)
        keys = torch.cat([self.tensors.dense_keys[span, :, :held], keys], 2)
        values = torch.cat([self.tensors.dense_values[span, :, :held], values], 2)
        at = np.concatenate([self.numbers.positions[span, :held], at], 1)
        start, tail = self.settings.sink_length, self.settings.tail_length
        stop = start + max(0, keys.shape[2] - start - tail) // self.page_size * self.page_size
        if stop > start:
            self._pack(rows, keys[:, :, start:stop], values[:, :, start:stop], at[:, start:stop], keep_from)
            keys, values = (torch.cat([x[:, :, :start], x[:, :, stop:]], 2) for x in (keys, values))
            at = np.concatenate([at[:, :start], at[:, stop:]], 1)
        count = keys.shape[2]
        self.tensors.dense_keys[span, :, :count] = keys
        self.tensors.dense_values[span, :, :count] = values
        self.numbers.positions[span, :count] = at
        self.lengths[rows] = count

    def _note_places(self, rows: np.ndarray, positions: np.ndarray) -> None:
        """Take note of where the new tokens ``positions [len(rows), n]`` stand among those seen."""
        if positions.size == 0:
            return
        counters = self.numbers.counters
        first, last = counters[FIRST, rows], counters[LAST, rows]
        before = np.where(last < 0, positions[:, 0] - 1, last)
        counters[GAPS, rows] |= positions[:, -1] - before != positions.shape[1]
        counters[FIRST, rows] = np.where(last < 0, positions[:, 0], first)
        counters[LAST, rows] = positions[:, -1]

    # -- taking back ----------------------------------------------------------------------------------------------

    def can_truncate(self, position: int) -> bool:
        """Whether the layer can return to what it was before the token at ``position``."""
        kept = self._kept(position)
        # With fewer, plain decoding would not have packed the newest page yet.
        least = self.settings.sink_length + self.settings.tail_length
        if ((self.numbers.counters[MEAN_KNOWN] > 0) & (kept < least)).any():
            return False
        if self.settings.window is None:
            return True
        oldest = self.numbers.positions[:, 0].copy()
        paged = self.pages_held > 0
        oldest[paged] = self.numbers.paged[paged, 0, 0]
        # All tokens in the window of the query at `position` must be held.
        needed = np.maximum(self.numbers.counters[FIRST], self.settings.start(position))
        return bool(((oldest <= needed) | (self.numbers.counters[LAST] < 0)).all())

    def truncate_from(self, position: int) -> None:
        """Forget the tokens at ``position`` and after, none of which may be packed."""
        self._follows = -1
        self.lengths[:] = self._kept(position)
        self.numbers.seen[:] = position
        if position == 0:
            self.unbalance()
        counters, paged = self.numbers.counters, self.numbers.paged
        for row in range(self.batch):
            slots, pages = int(self.lengths[row]), int(self.pages_held[row])
            ends = self.numbers.positions[row, [0, slots - 1]].tolist() if slots else []
            ends += paged[row, [0, pages - 1], [0, -1]].tolist() if pages else []
            if ends:
                counters[LAST, row] = max(ends)
                counters[GAPS, row] = slots + pages * self.page_size != max(ends) - min(ends) + 1
            else:
                counters[FIRST, row] = counters[LAST, row] = -1
                counters[GAPS, row] = 0
        self.numbers.write_state()

    def _kept(self, position: int) -> np.ndarray:
        """How many slots of each sequence hold tokens before ``position``."""
        used = np.arange(self.slots) < self.lengths[:, None]
        return (used & (self.numbers.positions < position)).sum(1)


#: The storages in use, by the addresses of their tensors. Their layers keep them alive.
_live: WeakValueDictionary[tuple[int, ...], StaticStorage] = WeakValueDictionary()


def storage_of(tensors: StaticTensors, settings: StaticSettings) -> StaticStorage:
    """The storage over these tensors: the one in use, or a new one.

    A graph may give copies of a layer's tensors to an operator, and copy them back. Copies have other addresses.
    """
    at = tuple(tensor.data_ptr() for tensor in tensors)
    known = _live.get(at)
    if known is None:
        known = _live[at] = StaticStorage(tensors, settings)
    return known
