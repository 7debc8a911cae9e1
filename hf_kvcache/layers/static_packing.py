"""Packing of pages into the tensors of a layer with a fixed maximum length, by functions on the host."""

from __future__ import annotations

import numpy as np
import torch

from hf_kvcache.kernels.static_state import MEAN_KNOWN
from hf_kvcache.layers.static_contents import StaticContents
from hf_kvcache.storage.encoding import encoded_in_parts
from hf_kvcache.storage.key_basis import key_scale, write_key_mean
from hf_kvcache.storage.transfers import rows_of, to_device
from hf_kvcache.utils.autocast import without_autocast


class StaticPacking(StaticContents):
    """The tensors of one layer, whose oldest tokens in full precision become pages."""

    def _pack(
        self, rows: np.ndarray, keys: torch.Tensor, values: torch.Tensor, positions: np.ndarray, keep_from: int
    ) -> None:
        """Make pages of ``keys [b, H, n * P, Dk]``, but for those whose tokens all stand before ``keep_from``."""
        stale = (positions[:, self.page_size - 1 :: self.page_size] < keep_from).sum(1)
        if (stale != stale[0]).any():
            for i in range(len(rows)):
                one = slice(i, i + 1)
                self._pack(rows[one], keys[one], values[one], positions[one], keep_from)
            return
        skip = int(stale[0]) * self.page_size
        if skip < keys.shape[2]:
            with without_autocast(keys.device):
                self._write(rows, keys[:, :, skip:], values[:, :, skip:], positions[:, skip:])

    def _write(self, rows: np.ndarray, keys: torch.Tensor, values: torch.Tensor, positions: np.ndarray) -> None:
        """Encode whole pages of ``keys [b, H, n * P, Dk]`` and count them."""
        page_size, batch, pages = self.page_size, len(rows), keys.shape[2] // self.page_size
        mean, known = self.tensors.key_mean, self.numbers.counters[MEAN_KNOWN]
        if mean is not None:
            write_key_mean(self.settings.encoder, rows, keys, mean, self.tensors.key_scale, known)
        columns = self.pages_held[rows][:, None] + np.arange(pages)  # [b, n]
        table_rows = (rows[:, None] * self.heads + np.arange(self.heads)).reshape(-1)
        head_columns = columns.repeat(self.heads, 0)  # [b * H, n]
        self._encode(rows, keys, values, self.numbers.places[table_rows[:, None], head_columns])
        paged = positions.reshape(batch, pages, page_size)
        self.numbers.paged[rows[:, None], columns] = paged
        self.numbers.first[table_rows[:, None], head_columns] = paged[:, :, 0].repeat(self.heads, 0)
        known[rows] = 1  # for codecs without a mean too, as a compiled step does
        self.pages_held[rows] += pages
        self.numbers.page_events += 1

    def balance(self, query: torch.Tensor, keys: torch.Tensor, valid: np.ndarray | None) -> None:
        """Fix the scale of the keys by a first update; see :meth:`hf_kvcache.storage.key_basis.KeyBasis.balance`."""
        scale = self.tensors.key_scale
        if scale is not None and self.seen == 0:
            scale.copy_(key_scale(query, keys, valid, self.settings.sink_length))

    def unbalance(self) -> None:
        """Forget the scale of the keys."""
        if self.tensors.key_scale is not None:
            self.tensors.key_scale.fill_(1)

    def _encode(self, rows: np.ndarray, keys: torch.Tensor, values: torch.Tensor, places: np.ndarray) -> None:
        """Encode whole pages of ``keys [b, H, n * P, Dk]`` into the records ``places [b * H, n]``."""
        encoder, records, device = self.settings.encoder, self.tensors.records, keys.device
        whole = self.tensors.key_mean, self.tensors.key_scale
        mean, scale = (None if t is None else rows_of(t, rows) for t in whole)
        if encoder.writes_at_once(keys, values):
            addresses = records.data_ptr() + places.T.reshape(-1) * self.layout.record_bytes
            encoder.write(keys, values, mean, scale, to_device(addresses, device))
            return
        for start, stop, part in encoded_in_parts(encoder, keys, values, mean, scale):
            records[to_device(places[:, start:stop].T.reshape(-1), device)] = part

    def _drop_packed(self, every: slice | torch.Tensor, rows: np.ndarray, start: int, stop: int) -> None:
        """Remove the slots ``start ... stop - 1`` of sequences that use all slots, shifting the rest down."""
        rest = slice(start, self.slots - self.page_size)
        for dense in (self.tensors.dense_keys, self.tensors.dense_values):
            dense[every, :, rest] = dense[every, :, stop:].clone()
        self.numbers.positions[rows, rest] = self.numbers.positions[rows, stop:]
        self.lengths[rows] -= self.page_size

    def _drop_before(self, position: int) -> None:
        """Forget the pages all of whose tokens stand before ``position`` (sliding windows)."""
        held = self.pages_held
        if position == 0 or not held.any():
            return
        last = self.numbers.paged[:, :, -1]
        stale = ((last < position) & (np.arange(last.shape[1]) < held[:, None])).sum(1)
        if not stale.any():
            return
        self.numbers.page_events += 1
        for row in np.flatnonzero(stale).tolist():
            rows, shift = slice(row * self.heads, (row + 1) * self.heads), -int(stale[row])
            for table in (self.numbers.places, self.numbers.first):
                table[rows] = np.roll(table[rows], shift, 1)
            self.numbers.paged[row] = np.roll(self.numbers.paged[row], shift, 0)
        held -= stale
