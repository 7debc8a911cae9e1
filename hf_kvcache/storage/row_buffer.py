"""Rows of a sequence in one preallocated tensor that drops rows at both ends."""

from __future__ import annotations

import numpy as np
import torch

from hf_kvcache.storage.transfers import to_device


class RowBuffer:
    """Rows ``[B, n, width]`` of the positions ``start`` to ``stop``.

    Rows are appended behind the last one, and dropped at either end. A full buffer grows by a sixteenth, so that most
    appends copy no earlier row. Rows never move within a buffer: a view of them stays what it is until rows are dropped
    at the end and others take their place.

    Args:
        room: number of rows for which there is room at least, beside those that are held when a buffer is made.

    Attributes:
        start: position of the first row that is held.
        stop: position behind the last row.
    """

    def __init__(self, room: int = 32) -> None:
        self._room = room
        self._buffer: torch.Tensor | None = None
        self._offset = 0  # index of the first row in the buffer
        self._shared = False  # whether another row buffer reads the same tensor
        self.start = self.stop = 0

    @property
    def batch(self) -> int:
        """Number of sequences, or -1 before the first append."""
        return -1 if self._buffer is None else self._buffer.shape[0]

    @property
    def width(self) -> int:
        """Width of a row; 0 before the first append."""
        return 0 if self._buffer is None else self._buffer.shape[2]

    def __len__(self) -> int:
        return self.stop - self.start

    def append(self, rows: torch.Tensor, keep_from: int = 0) -> None:
        """Append ``rows [B, n, width]``.

        Args:
            rows: the new rows; they are copied.
            keep_from: position before which rows need not be held. Those among the new ones are not copied.
        """
        stop = self.stop + rows.shape[1]
        start = min(max(self.start, keep_from), stop)
        fresh = rows[:, max(start - self.stop, 0) :].detach()
        self._offset += min(start, self.stop) - self.start
        self.start, self.stop = start, max(self.stop, start)
        at, count = self._offset + self.stop - start, stop - start
        if self._buffer is None or self._shared or at + fresh.shape[1] > self._buffer.shape[1]:
            self._move(rows, count + max(count // 16, self._room))
            at = self.stop - start
        assert self._buffer is not None
        self._buffer[:, at : at + fresh.shape[1]] = fresh
        self.stop = stop

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """A view of the rows of the positions from ``start`` to ``stop``, ``[B, stop - start, width]``."""
        assert self._buffer is not None and self.start <= start <= stop <= self.stop, (start, stop, self.start)
        return self._buffer[:, self._offset + start - self.start : self._offset + stop - self.start]

    def drop_before(self, position: int) -> None:
        """Drop the rows before ``position``. Memory is given back where most of it is unused."""
        position = min(max(position, self.start), self.stop)
        self._offset += position - self.start
        self.start = position
        count = len(self)
        if self._buffer is not None and self._buffer.shape[1] > 2 * count + 2 * self._room:
            self._move(self._buffer, count + max(count // 16, self._room))

    def truncate(self, stop: int) -> None:
        """Drop the rows from position ``stop`` on."""
        self.stop = min(self.stop, max(stop, self.start))

    def select(self, rows: np.ndarray) -> None:
        """Replace sequence ``i`` by sequence ``rows[i]``, for every ``i``."""
        if self._buffer is not None:
            with torch.inference_mode(False):
                self._buffer = self._buffer[to_device(rows, self._buffer.device)]
            self._shared = False

    def fork(self) -> RowBuffer:
        """An independent copy. Both read the same tensor until one of them appends to it."""
        other = object.__new__(RowBuffer)
        self._shared = True
        other.__dict__.update(self.__dict__)
        return other

    def used_bytes(self) -> int:
        """Bytes of the rows that are held."""
        return 0 if self._buffer is None else self.rows(self.start, self.stop).numel() * self._buffer.element_size()

    def allocated_bytes(self) -> int:
        """Bytes of the allocated tensor."""
        return 0 if self._buffer is None else self._buffer.numel() * self._buffer.element_size()

    def state(self) -> torch.Tensor | None:
        """A copy of the rows, ``[B, n, width]``; None before the first append."""
        return None if self._buffer is None else self.rows(self.start, self.stop).clone()

    def restore(self, rows: torch.Tensor, start: int) -> None:
        """Hold copies of ``rows``, the first of them at position ``start``."""
        self._buffer, self._offset, self._shared = None, 0, False
        self.start = self.stop = start
        self.append(rows)

    def _move(self, like: torch.Tensor, room: int) -> None:
        """Move the rows to a new buffer with ``room`` rows, of the batch, width and dtype of ``like``."""
        with torch.inference_mode(False):  # an inference tensor could not be written outside of that mode
            grown = torch.empty(like.shape[0], room, like.shape[2], dtype=like.dtype, device=like.device)
        if len(self):
            grown[:, : len(self)] = self.rows(self.start, self.stop)
        self._buffer, self._offset, self._shared = grown, 0, False
