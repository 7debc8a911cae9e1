"""The full-precision part of a layer's cache: the attention sinks, then the tail of the newest tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hf_kvcache.kernels.device_table import send
from hf_kvcache.storage.integrity import IntegrityError

#: Slots of a buffer before the first token, at least.
_FIRST_SLOTS = 16


class DenseBuffer:
    """Slots of full-precision keys and values per sequence, in the order of their tokens.

    The first ``sink_length`` tokens of a sequence stay in the first slots for good; the tail follows.

    Args:
        keys: tensor whose batch, heads, width, dtype and device the buffer takes, ``[B, Hkv, T, Dk]``. There is room
            for ``T`` tokens at first, if that is no more than usual.
        values: the same for values, ``[B, Hkv, T, Dv]``.
        sink_length: slots that are never shifted.
        capacity: slots to grow to as tokens come, and to return to after more.

    Attributes:
        uniform_length: the number of slots in use if it is the same in every sequence, else None.
        longest: the most slots that a sequence uses.
        lengths: int64 ``[B]``, slots in use. Prepared calls count in it, and keep slots and positions on the device; so
            tokens that move to other slots give it a new array, by which callers see that the call is no longer right.
    """

    # Buffers made under inference mode could not be written outside of it, wherever a cache is used in both.
    @torch.inference_mode(False)
    def __init__(self, keys: torch.Tensor, values: torch.Tensor, sink_length: int, capacity: int) -> None:
        batch = keys.shape[0]
        self.sink_length, self._usual_capacity = sink_length, capacity
        slots = min(capacity, max(keys.shape[2], _FIRST_SLOTS))  # a long prompt will need all of them
        # Zeros, because a masked slot is still multiplied with a probability of zero.
        self.keys = keys.new_zeros(*keys.shape[:2], slots, keys.shape[3])
        self.values = values.new_zeros(*values.shape[:2], slots, values.shape[3])
        self.positions = np.zeros((batch, slots), dtype=np.int64)
        self.lengths = np.zeros(batch, dtype=np.int64)
        self.uniform_length: int | None = 0
        self.longest = 0
        # The positions on the device, and a copy of what was sent there.
        self._there: tuple[torch.Tensor, np.ndarray] | None = None

    @property
    def capacity(self) -> int:
        return self.positions.shape[1]

    @property
    def bookkeeping_bytes(self) -> int:
        """Bytes of positions and lengths, those on the device included."""
        copies = 0 if self._there is None else 2 * self._there[1].nbytes
        return self.positions.nbytes + self.lengths.nbytes + copies

    def positions_on_device(self) -> torch.Tensor:
        """The positions on the device of the keys, int64 ``[B, capacity]``. They are sent there if they have changed.

        The tensor stays the same as long as the capacity does.
        """
        held, device = self._there, self.keys.device
        if held is not None and held[0].device == device and held[1].shape == self.positions.shape:
            there = held[0]
            if np.array_equal(held[1], self.positions):
                return there
        else:
            with torch.inference_mode(False):
                there = torch.empty(self.positions.shape, dtype=torch.int64, device=device)
        positions = self.positions.copy()
        send(positions, there)
        self._there = there, positions
        return there

    def append_one(self, keys: torch.Tensor, values: torch.Tensor, position: int, valid: np.ndarray | None) -> None:
        """Append one token to each sequence; ``valid [B]`` is False where it is padding, which is not stored."""
        self.reserve(self.longest + 1)
        if self.uniform_length is not None and valid is None:
            slot = self.uniform_length
            self.keys.narrow(2, slot, 1).copy_(keys)
            self.values.narrow(2, slot, 1).copy_(values)
            self.positions[:, slot] = position
            self.lengths += 1
            self.uniform_length = self.longest = slot + 1
            return
        rows = np.arange(len(self.lengths)) if valid is None else np.flatnonzero(valid)
        slots = self.lengths[rows]
        row_index, slot_index = (torch.from_numpy(i).to(self.keys.device) for i in (rows, slots))
        self.keys[row_index, :, slot_index] = keys[row_index, :, 0]
        self.values[row_index, :, slot_index] = values[row_index, :, 0]
        self.positions[rows, slots] = position
        self.lengths[rows] += 1
        self._note_lengths()

    def store(self, row: int | slice, keys: torch.Tensor, values: torch.Tensor, positions: np.ndarray) -> None:
        """Replace the tokens of the sequences ``row`` by ``keys [b, Hkv, n, Dk]`` and ``values``."""
        count = keys.shape[2]
        self.reserve(count)
        self.keys[row, :, :count] = keys if isinstance(row, slice) else keys[0]
        self.values[row, :, :count] = values if isinstance(row, slice) else values[0]
        self.positions[row, :count] = positions
        self.lengths = self.lengths.copy()
        self.lengths[row] = count
        self._note_lengths()

    def adopt(self, keys: torch.Tensor, values: torch.Tensor, positions: np.ndarray) -> None:
        """Take ``keys [B, Hkv, n, Dk]`` and ``values`` as the slots, all of them in use, without copying them."""
        self.keys, self.values, self.positions = keys, values, positions.copy()
        self.lengths[:] = keys.shape[2]
        self._note_lengths()

    def set_lengths(self, lengths: np.ndarray) -> None:
        """Set the number of slots that each sequence uses."""
        self.lengths = lengths.astype(np.int64)  # kernels count in it
        self._note_lengths()

    def drop_oldest(self, rows: np.ndarray, count: int) -> None:
        """Remove the ``count`` oldest tail tokens of each of ``rows``, shifting the rest down."""
        start = self.sink_length
        if len(rows) == len(self.lengths) and self.uniform_length is not None:
            self._drop_oldest_of_all(count)
            return
        for row in [slice(None)] if len(rows) == len(self.lengths) else rows.tolist():
            stop = int(self.lengths[row].max()) if isinstance(row, slice) else int(self.lengths[row])
            rest = slice(start + count, stop)
            moved = slice(start, stop - count)
            for side in (self.keys, self.values):
                left = side[row, ..., rest, :]
                # Ranges that overlap are copied out first.
                side[row, ..., moved, :] = left.clone() if stop - count - start > count else left
            self.positions[row, ..., moved] = self.positions[row, ..., rest].copy()
        self.lengths = self.lengths.copy()
        self.lengths[rows] -= count
        self._note_lengths()

    def _drop_oldest_of_all(self, count: int) -> None:
        """:meth:`drop_oldest` of all sequences, which hold equally many tokens."""
        start, left = self.sink_length, self.longest - self.sink_length - count
        for side in (self.keys, self.values):
            rest = side.narrow(2, start + count, left)
            side.narrow(2, start, left).copy_(rest.clone() if left > count else rest)  # ranges that overlap
        positions = self.positions
        positions[:, start : start + left] = positions[:, start + count : start + count + left].copy()
        self.lengths = self.lengths - count
        self.uniform_length = self.longest = start + left

    def truncate_from(self, position: int) -> None:
        """Forget the tokens at ``position`` and after."""
        used = np.arange(self.capacity)[None] < self.lengths[:, None]
        self.lengths = (used & (self.positions < position)).sum(1, dtype=np.int64)
        self._note_lengths()

    @torch.inference_mode(False)
    def select(self, rows: np.ndarray) -> None:
        """Replace the sequences by ``rows`` of them, which may repeat."""
        index = torch.from_numpy(rows).to(self.keys.device)
        # Much faster than indexing.
        self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
        self.positions, self.lengths = self.positions[rows], self.lengths[rows]
        self._note_lengths()

    @torch.inference_mode(False)
    def fork(self) -> DenseBuffer:
        """An independent copy."""
        other = object.__new__(DenseBuffer)
        other.__dict__.update(self.__dict__)
        other.keys, other.values = self.keys.clone(), self.values.clone()
        other.positions, other.lengths = self.positions.copy(), self.lengths.copy()
        other._there = None
        return other

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_there": None}

    def reserve(self, slots: int) -> None:
        """Make room for ``slots`` slots. A short sequence has a small buffer: it doubles until it has its usual size.

        Beyond that it grows by half, where tokens that may be rolled back are not packed yet.
        """
        if slots <= self.capacity:
            return
        usual = self._usual_capacity
        room = min(self.capacity * 2, usual) if slots <= usual else self.capacity * 3 // 2
        extra = max(slots, room) - self.capacity
        with torch.inference_mode(False):
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, extra))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, extra))
        self.positions = np.pad(self.positions, ((0, 0), (0, extra)))

    def reserve_usual(self) -> None:
        """Make all the room that is usual: the sequences are long enough for pages."""
        self.reserve(self._usual_capacity)

    def shrink(self, capacity: int | None = None) -> None:
        """Give back the room beyond ``capacity`` slots, by default the usual ones, if the content allows."""
        capacity = self._usual_capacity if capacity is None else capacity
        if not self.capacity > capacity >= self.longest:
            return
        with torch.inference_mode(False):
            self.keys = self.keys[:, :, :capacity].clone()
            self.values = self.values[:, :, :capacity].clone()
            self.positions = self.positions[:, :capacity].copy()

    def check(self) -> None:
        """Raise IntegrityError unless lengths fit and positions ascend."""
        if self.lengths.min(initial=0) < 0 or self.longest > self.capacity:
            raise IntegrityError(f"{self.lengths} slots in use of {self.capacity}")
        for row, length in enumerate(self.lengths.tolist()):
            if (np.diff(self.positions[row, :length]) <= 0).any():
                raise IntegrityError(f"the positions of sequence {row} do not ascend in the dense buffer")

    def _note_lengths(self) -> None:
        first = int(self.lengths[0]) if len(self.lengths) else 0
        self.uniform_length = first if bool((self.lengths == first).all()) else None
        self.longest = int(self.lengths.max(initial=0))
