"""What one compressor of DeepSeek V4 leaves in the cache: raw rows, the overlap of windows, compressed entries."""

from __future__ import annotations

import numpy as np
import torch

from hf_kvcache.codecs.base import Codec
from hf_kvcache.storage.packed_rows import PackedRows
from hf_kvcache.storage.row_buffer import RowBuffer

#: Windows and entries for which there is room at least. A row of a window is as wide as all of its tokens together.
_ROOM_OVERLAP, _ROOM_ENTRIES = 2, 16
#: Names of the row buffers of a compression, in saved states.
_BUFFERS = ("raw_kv", "raw_gate", "overlap_kv", "overlap_gate", "entries")


class Compression:
    """The state of one compressor.

    A compressor makes one entry of every ``rate`` tokens: a *window of compression*, whose tokens have two rows each, a
    projection and a gate. The rows of a window are held until it is full and its tokens are confirmed. Some compressors
    mix a part of the rows of the window before, the *overlap*.

    Args:
        rate: number of tokens of an entry.
        codec: how entries are packed; None to hold them as they are.
        rotary: number of rotary channels at the end of an entry.

    Attributes:
        raw_kv: projections ``[B, tokens, w]``, by position of the token.
        raw_gate: gates, likewise.
        overlap_kv: what a window hands to the next one, ``[B, windows, rate * D]``, by number of the window.
        overlap_gate: the gates of that.
        entries: the compressed entries ``[B, windows, D]``.
    """

    def __init__(self, rate: int, codec: Codec | None, rotary: int) -> None:
        self.rate, self._codec, self._rotary = rate, codec, rotary
        self.raw_kv, self.raw_gate = RowBuffer(rate), RowBuffer(rate)
        self.overlap_kv, self.overlap_gate = RowBuffer(_ROOM_OVERLAP), RowBuffer(_ROOM_OVERLAP)
        self.entries = PackedRows(codec, rotary, _ROOM_ENTRIES)

    @property
    def seen(self) -> int:
        """Number of tokens that the compressor has been given."""
        return self.raw_kv.stop

    @property
    def count(self) -> int:
        """Number of entries."""
        return self.entries.stop

    def take(self, kv: torch.Tensor, gate: torch.Tensor, keep_from: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Add the rows of new tokens.

        Args:
            kv: projections ``[B, T, w]``.
            gate: gates ``[B, T, w]``.
            keep_from: the least number of tokens that a ``crop`` may return to.

        Returns:
            The projections and gates of all windows that are full now and have no entry yet, ``[B, n * rate, w]``, and
            the position of the first of their tokens.
        """
        first, before = self.count * self.rate, self.seen
        full = (before + kv.shape[1]) // self.rate * self.rate
        needed = keep_from // self.rate * self.rate
        if before == 0 or (kv.requires_grad and torch.is_grad_enabled()):
            # Nothing is held of a first pass, and what is held has no gradient: the new rows are returned themselves.
            chunk_kv, chunk_gate = kv, gate
            if before > first:
                chunk_kv = torch.cat([self.raw_kv.rows(first, before), kv], 1)
                chunk_gate = torch.cat([self.raw_gate.rows(first, before), gate], 1)
            self.raw_kv.append(kv, needed)
            self.raw_gate.append(gate, needed)
            return chunk_kv[:, : full - first], chunk_gate[:, : full - first], first
        self.raw_kv.append(kv)
        self.raw_gate.append(gate)
        chunk_kv, chunk_gate = self.raw_kv.rows(first, full), self.raw_gate.rows(first, full)
        self.raw_kv.drop_before(needed)
        self.raw_gate.drop_before(needed)
        return chunk_kv, chunk_gate, first

    def overlap(
        self, kv: torch.Tensor, gate: torch.Tensor, keep_from: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Take what full windows hand to the next one, and return what the first of them is handed.

        Args:
            kv: ``[B, n, rate, D]``, for the ``n`` windows that have no entry yet.
            gate: the gates of that.
            keep_from: as in :meth:`take`.

        Returns:
            ``[B, rate, D]`` and its gates; None if there is no window before.
        """
        first, shape = self.count, (kv.shape[0], self.rate, kv.shape[3])
        prior_kv = self.overlap_kv.rows(first - 1, first).view(shape) if first else None
        prior_gate = self.overlap_gate.rows(first - 1, first).view(shape) if first else None
        needed = keep_from // self.rate - 1
        for buffer, new in ((self.overlap_kv, kv), (self.overlap_gate, gate)):
            buffer.append(new.flatten(2), needed)
        return prior_kv, prior_gate

    def add_entries(self, entries: torch.Tensor) -> None:
        """Add the entries ``[B, n, D]`` of the windows that were full."""
        self.entries.append(entries)

    def confirm(self, keep_from: int) -> None:
        """Drop what only a ``crop`` to fewer than ``keep_from`` tokens would need."""
        for raw in (self.raw_kv, self.raw_gate):
            raw.drop_before(keep_from // self.rate * self.rate)
        for overlap in (self.overlap_kv, self.overlap_gate):
            overlap.drop_before(keep_from // self.rate - 1)

    def can_return(self, length: int) -> bool:
        """Whether everything is held that the first ``length`` tokens leave."""
        windows = length // self.rate
        overlaps = self.overlap_kv.stop == 0 or windows == 0 or self.overlap_kv.start < windows
        return length == 0 or (self.raw_kv.start <= windows * self.rate and overlaps)

    def truncate(self, length: int) -> None:
        """Return to the first ``length`` tokens; see :meth:`can_return`."""
        windows = length // self.rate
        for raw in (self.raw_kv, self.raw_gate):
            raw.truncate(length)
        for buffer in (self.overlap_kv, self.overlap_gate, self.entries.buffer):
            buffer.truncate(windows)

    def select(self, rows: np.ndarray) -> None:
        """Replace sequence ``i`` by sequence ``rows[i]``, for every ``i``."""
        for buffer in self.buffers().values():
            buffer.select(rows)

    def fork(self) -> Compression:
        """An independent copy."""
        other = object.__new__(Compression)
        other.__dict__.update(self.__dict__)
        for name in _BUFFERS:
            setattr(other, name, getattr(self, name).fork())
        return other

    def full_elements(self) -> int:
        """Number of elements that transformers' own layer holds for a sequence of as many tokens."""
        width, windows = self.raw_kv.width, self.seen // self.rate
        overlap = 2 * self.overlap_kv.width if windows else 0
        return windows * self.entries.width + 2 * width * (self.seen % self.rate) + overlap

    def buffers(self) -> dict[str, RowBuffer]:
        """The row buffers by name."""
        return {name: self.entries.buffer if name == "entries" else getattr(self, name) for name in _BUFFERS}
