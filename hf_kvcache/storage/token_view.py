"""The tokens of some sequences in the order of their positions, whatever part of the storage they lie in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from hf_kvcache.storage.page_table import NOWHERE
from hf_kvcache.storage.paged import PagedStorage

#: Pages that share scales cannot be merged: those with fewer of their tokens than this share are given up.
_SPARSE = 1 / 4


@dataclass
class TokenView:
    """Sinks, then pages, then tail of some sequences that use equally many slots of the dense buffer.

    Attributes:
        storage: the storage that holds the tokens; the view is valid until the storage changes.
        rows: the sequences, ``[b]``.
        slots: int64 ``[b, Hkv, T]``: a slot of the dense buffer, or ``dense slots + column * P + place`` in a page.
        exists: bool ``[b, Hkv, T]``, False behind the last token of a head that holds fewer.
        positions: int64 ``[b, Hkv, T]``, original positions, ``NOWHERE`` where there is no token.
    """

    storage: PagedStorage
    rows: np.ndarray
    slots: np.ndarray
    exists: np.ndarray
    positions: np.ndarray

    @classmethod
    def of(cls, storage: PagedStorage, rows: np.ndarray) -> TokenView:
        """The tokens of the sequences ``rows`` of ``storage``, which use equally many slots of the dense buffer."""
        used, size, batch = int(storage.dense.lengths[rows[0]]), storage.page_size, len(rows)
        sinks = min(used, storage.sink_length)
        table_rows = storage.table.rows_of(rows)
        columns = int(storage.table.lengths[table_rows].max(initial=0))
        counts = storage.table.counts(table_rows, columns)
        paged = np.arange(size) < counts[:, :, None]
        shape = (batch, storage.heads, -1)
        dense = np.broadcast_to(np.arange(used), (batch, storage.heads, used))
        in_pages = np.broadcast_to(used + np.arange(columns * size), (batch, storage.heads, columns * size))
        slots = np.concatenate([dense[..., :sinks], in_pages, dense[..., sinks:]], -1)
        exists = np.ones(slots.shape, bool)
        exists[..., sinks : sinks + columns * size] = paged.reshape(shape)
        at = np.repeat(storage.dense.positions[rows, None, :used], storage.heads, 1)
        page_positions = storage.table.positions(0, columns, size, table_rows).reshape(shape)
        positions = np.concatenate([at[..., :sinks], page_positions, at[..., sinks:]], -1)
        if not exists.all():
            order = np.argsort(~exists, axis=-1, kind="stable")[..., : int(exists.sum(-1).max(initial=0))]
            slots, exists, positions = (np.take_along_axis(x, order, -1) for x in (slots, exists, positions))
        return cls(storage, rows, slots, exists, np.where(exists, positions, NOWHERE))

    @property
    def used(self) -> int:
        """Dense slots that each of the sequences uses."""
        return int(self.storage.dense.lengths[self.rows[0]])

    @property
    def tokens(self) -> int:
        """Tokens of the head that holds most."""
        return self.slots.shape[-1]

    @cached_property
    def columns(self) -> int:
        """Pages of the head that has most."""
        return int(self.storage.table.lengths[self.storage.table.rows_of(self.rows)].max(initial=0))

    @cached_property
    def index(self) -> torch.Tensor:
        """``slots`` on the storage's device, 0 where there is no token."""
        return torch.from_numpy(np.where(self.exists, self.slots, 0)).to(self.storage.device)

    def pick(self, by_slot: torch.Tensor) -> torch.Tensor:
        """``by_slot [b, Hkv, dense slots + columns * P]`` in the order of the tokens, 0 where there is none."""
        return by_slot.gather(2, self.index).masked_fill_(self._missing, 0)

    def states(self, side: str) -> torch.Tensor:
        """Keys or values, float32 ``[b, Hkv, T, D]``, decoded; 0 where there is no token."""
        storage, used = self.storage, self.used
        dense = getattr(storage.dense, side)[:, :, :used]
        if len(self.rows) < storage.batch:
            dense = dense[torch.from_numpy(self.rows).to(storage.device)]
        packed = self._decoded(side)
        if packed is None:  # all of it lies in the order of its tokens already
            return dense.float()
        whole = torch.cat([dense.float(), packed], 2)
        picked = whole.gather(2, self.index.unsqueeze(-1).expand(-1, -1, -1, whole.shape[-1]))
        return picked.masked_fill_(self._missing.unsqueeze(-1), 0)

    def in_sparse_pages(self, keep: np.ndarray, protected: np.ndarray) -> np.ndarray:
        """Tokens of pages that would be left with few of their tokens, none of them protected; all ``[b, Hkv, T]``."""
        size = self.storage.page_size
        columns = int(self.slots.max(initial=0)) // size + 1
        page = np.where(self.slots >= self.used, (self.slots - self.used) // size, columns)

        def per_page(mask: np.ndarray) -> np.ndarray:
            counts = np.zeros((*mask.shape[:2], columns + 1), np.int64)
            row, head, token = np.nonzero(mask)
            np.add.at(counts, (row, head, page[row, head, token]), 1)
            return counts

        kept = per_page(keep & self.exists)
        sparse = (kept < _SPARSE * size) & (kept < per_page(self.exists)) & (per_page(protected) == 0)
        sparse[..., columns] = False
        return np.take_along_axis(sparse, page, 2)

    @cached_property
    def _missing(self) -> torch.Tensor:
        return torch.from_numpy(~self.exists).to(self.storage.device)

    def _decoded(self, side: str) -> torch.Tensor | None:
        """The pages of the sequences, ``[b, Hkv, columns * P, D]``; arbitrary where a row has no page."""
        storage, columns = self.storage, self.columns
        if columns == 0:
            return None
        # A column of pages at a time, as they are stored, so that they lie side by side.
        ids = storage.table.ids(storage.table.rows_of(self.rows), columns).T
        records = storage.pool.read(np.where(ids >= 0, ids, ids.max()).flatten()).unflatten(0, ids.shape)
        shape = (*ids.shape, storage.page_size, storage.layout.sides[side].dim)
        buffer = torch.empty(shape, device=storage.device)
        tokens = storage.encoder.decode(side, records, storage.writer.key_mean_of(self.rows), buffer)
        return tokens.unflatten(0, (len(self.rows), storage.heads))
