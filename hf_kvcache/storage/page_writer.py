"""Packing: tokens that leave the dense buffer are encoded into pages, which the page table then holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.storage.dense_buffer import DenseBuffer
from hf_kvcache.storage.encoding import encoded_in_parts
from hf_kvcache.storage.key_basis import KeyBasis
from hf_kvcache.storage.page_table import PageTable
from hf_kvcache.storage.transfers import rows_of, to_device
from hf_kvcache.utils.autocast import without_autocast

#: Turns keys ``[b, Hkv, n, Dk]`` of the sequences ``rows`` at ``positions [b, n]`` into the keys that pages hold.
AsPacked = Callable[[np.ndarray, torch.Tensor, np.ndarray], torch.Tensor]


class PageWriter:
    """Knows which tokens of the dense buffer are due to be packed, and packs them.

    Args:
        encoder: makes page records.
        table: receives the pages.
        dense: holds the tokens that are not packed yet.
        tail_length: newest tokens of a sequence that are never packed.

    Attributes:
        first_due: slots of the dense buffer that a sequence uses when its first page is due.
        ahead: pages at the end of every row of the table whose tokens are still in the dense buffer too, until they
            are confirmed.
        lost_before: no token before this position need be held any more (sliding windows).
        basis: scale and mean of the keys of each sequence.
    """

    @torch.inference_mode(False)
    def __init__(self, encoder: PageEncoder, table: PageTable, dense: DenseBuffer, tail_length: int) -> None:
        self.encoder, self.table, self.dense = encoder, table, dense
        self.page_size, self.tail_length = encoder.layout.page_size, tail_length
        self.first_due = dense.sink_length + tail_length + self.page_size
        self.ahead = 0
        self.lost_before = 0
        self.basis = KeyBasis(encoder, len(dense.lengths), table.heads, dense.keys.device)

    # -- when -----------------------------------------------------------------------------------------------------

    def due(self, slots: Any) -> Any:
        """How many pages are to be packed once ``slots`` slots of the dense buffer are in use."""
        return np.maximum(slots - self.dense.sink_length - self.tail_length, 0) // self.page_size

    def pack_due(self, keep_from: int, as_packed: AsPacked) -> None:
        """Pack every page that is due; tokens before position ``keep_from`` may be dropped instead."""
        dense, first = self.dense, self.dense.sink_length
        if dense.longest < self.first_due:
            return
        for pages, rows in self._rows_due():
            span = slice(first, first + pages * self.page_size)
            keys, values = (rows_of(x, rows)[:, :, span] for x in (dense.keys, dense.values))
            self._pack(rows, keys, values, dense.positions[rows, span], keep_from, as_packed)
            dense.drop_oldest(rows, pages * self.page_size)
        dense.shrink()

    def pack_new(
        self,
        rows: np.ndarray,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: np.ndarray,
        keep_from: int,
        as_packed: AsPacked,
    ) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Pack what is due of tokens that are on their way into the dense buffer.

        Args:
            rows: the sequences, which have equally many tokens.
            keys: ``[b, Hkv, n, Dk]``, all that the dense buffer is to hold of them.
            values: ``[b, Hkv, n, Dv]``.
            positions: ``[b, n]``.
            keep_from: tokens before this position may be dropped instead of packed.
            as_packed: what becomes of keys before they are encoded.

        Returns:
            Keys, values and positions of the tokens that stay in full precision.
        """
        pages = int(self.due(keys.shape[2]))
        if pages == 0:
            return keys, values, positions
        start, stop = self.dense.sink_length, self.dense.sink_length + pages * self.page_size
        span = slice(start, stop)
        self._pack(rows, keys[:, :, span], values[:, :, span], positions[:, span], keep_from, as_packed)
        self.dense.reserve_usual()
        keys, values = (torch.cat([x[:, :, :start], x[:, :, stop:]], 2) for x in (keys, values))
        return keys, values, np.concatenate([positions[:, :start], positions[:, stop:]], 1)

    def pack_ahead(self, pages: int, as_packed: AsPacked) -> None:
        """Encode the oldest tail tokens into ``pages`` pages in all, but keep the tokens until they are confirmed."""
        dense, rows = self.dense, np.arange(len(self.dense.lengths))
        # One at a time, as plain decoding would: the first page packed fixes the key mean.
        for page in range(self.ahead, pages):
            first = dense.sink_length + page * self.page_size
            span = slice(first, first + self.page_size)
            keys, values = dense.keys[:, :, span], dense.values[:, :, span]
            self._pack(rows, keys, values, dense.positions[:, span], 0, as_packed)
        self.ahead = max(self.ahead, pages)

    def commit_ahead(self) -> None:
        """Keep the pages packed ahead that are due by now, and their tokens only there; forget the other pages."""
        if self.ahead == 0:
            return
        keep = min(self.ahead, int(self.due(self.dense.lengths).min()))
        if keep < self.ahead:
            self.table.drop_last(self.ahead - keep)
        if keep:
            self.dense.drop_oldest(np.arange(len(self.dense.lengths)), keep * self.page_size)
        self.ahead = 0

    # -- how ------------------------------------------------------------------------------------------------------

    def encode(
        self, rows: np.ndarray, keys: torch.Tensor, values: torch.Tensor
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Records of whole pages of the sequences ``rows``: columns ``[start, stop)``, a bounded number at a time."""
        pages = keys.shape[2] // self.page_size
        if self.encoder.writes_at_once(keys, values):
            count = pages * keys.shape[0] * keys.shape[1]
            records = torch.empty(count, self.encoder.layout.record_bytes, dtype=torch.uint8, device=keys.device)
            self.encoder.write(keys, values, *self.basis.of(rows), records)
            yield 0, pages, records
            return
        yield from encoded_in_parts(self.encoder, keys, values, *self.basis.of(rows))

    def note_truncated(self) -> None:
        """Take note that pages were dropped: a sequence without a page has no basis any more."""
        self.basis.note_truncated(self.table.lengths[:: self.table.heads] > 0)

    # -- copies ---------------------------------------------------------------------------------------------------

    def select(self, rows: np.ndarray) -> None:
        """Replace the sequences by ``rows`` of them, which may repeat; the table and the buffer do so themselves."""
        self.basis.select(rows)

    def fork(self, table: PageTable, dense: DenseBuffer) -> PageWriter:
        """A second writer for a fork of the table and of the buffer."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.table, other.dense = table, dense
        other.basis = self.basis.fork()
        return other

    def __getstate__(self) -> dict[str, Any]:
        # The table goes along as the storage saves it, and the storage gives it back.
        return {name: value for name, value in self.__dict__.items() if name != "table"}

    # -- internals ------------------------------------------------------------------------------------------------

    def _rows_due(self) -> list[tuple[int, np.ndarray]]:
        """The numbers of pages that are due, each with the sequences of which so many are."""
        dense = self.dense
        if dense.uniform_length is not None:
            return [(int(self.due(dense.uniform_length)), np.arange(len(dense.lengths)))]
        due = self.due(dense.lengths)
        return [(pages, np.flatnonzero(due == pages)) for pages in np.unique(due[due > 0]).tolist()]

    def _pack(
        self,
        rows: np.ndarray,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: np.ndarray,
        keep_from: int,
        as_packed: AsPacked,
    ) -> None:
        """Make pages of ``keys [b, Hkv, n * P, Dk]``, but for those whose tokens all stand before ``keep_from``."""
        if keep_from:
            stale = (positions[:, self.page_size - 1 :: self.page_size] < keep_from).sum(1)
            if (stale != stale[0]).any():
                for i in range(len(rows)):
                    one = slice(i, i + 1)
                    self._pack(rows[one], keys[one], values[one], positions[one], keep_from, as_packed)
                return
            skip = int(stale[0]) * self.page_size
            if skip:
                self.lost_before = max(self.lost_before, int(positions[:, skip - 1].max()) + 1)
            keys, values, positions = keys[:, :, skip:], values[:, :, skip:], positions[:, skip:]
        if keys.shape[2]:
            with without_autocast(keys.device):
                self._write(rows, as_packed(rows, keys, positions), values, positions)

    def _write(self, rows: np.ndarray, keys: torch.Tensor, values: torch.Tensor, positions: np.ndarray) -> None:
        """Encode whole pages of ``keys [b, Hkv, n * P, Dk]`` and append them to the table."""
        pages, table, pool = keys.shape[2] // self.page_size, self.table, self.table.pool
        self.basis.fix_mean(rows, keys)
        table_rows = table.rows_of(rows)
        # Column by column, so that the pages that are read together lie together.
        flat_ids = pool.allocate(pages * len(table_rows))
        ids, addresses = flat_ids.reshape(pages, -1), pool.addresses(flat_ids).reshape(pages, -1)
        if pool.memory.in_place and self.encoder.writes_at_once(keys, values):
            # Another device than the host's is spared an upload if it can.
            records = None if keys.device.type == "cpu" else pool.memory.side_by_side(flat_ids)
            if records is None:
                records = to_device(addresses.reshape(-1), keys.device)
            self.encoder.write(keys, values, *self.basis.of(rows), records)
        else:
            for start, stop, records in self.encode(rows, keys, values):
                pool.write(ids[start:stop].flatten(), records)
        paged = positions.reshape(len(rows), pages, self.page_size)
        self._note_positions(paged, ids)
        table.append(table_rows, ids.T, addresses.T, paged[:, :, 0].repeat(table.heads, 0), self.page_size)

    def _note_positions(self, positions: np.ndarray, ids: np.ndarray) -> None:
        """Remember every position of the pages whose tokens do not stand side by side."""
        scattered, heads = positions[:, :, -1] - positions[:, :, 0] != self.page_size - 1, self.table.heads
        if not scattered.any():
            return
        for row, column in np.argwhere(scattered).tolist():
            for page in ids[column, row * heads : (row + 1) * heads].tolist():
                self.table.pool.note_positions(page, positions[row, column].copy())


def make_room(writer: PageWriter, tokens: int, window: int | None) -> None:
    """Allocate the pages that ``tokens`` more tokens may fill, if these lie outside of the device.

    Args:
        writer: of a storage.
        tokens: of each sequence.
        window: number of newest tokens that are to be held; None for all.

    Raises:
        OSError: if the disk has no room for them. Nothing has changed then.
    """
    pages = int(writer.due(writer.dense.longest + tokens)) - writer.ahead
    if window is not None:
        pages = min(pages, window // writer.page_size + 2)
    if pages > 0:
        writer.table.pool.reserve(pages * len(writer.table.lengths))
