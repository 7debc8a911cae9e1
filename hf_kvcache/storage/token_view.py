"""The tokens of some sequences in the order of their positions, whatever part of the storage they lie in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from hf_kvcache.kernels.page import BIAS
from hf_kvcache.storage.page_table import NOWHERE
from hf_kvcache.storage.paged import PagedStorage
from hf_kvcache.storage.transfers import ascending_on, front, rows_of, to_device

#: Pages that share scales cannot be merged: those with fewer of their tokens than this share are given up.
_SPARSE = 1 / 4


@dataclass
class TokenView:
    """Sinks, then pages, then tail of some sequences that use equally many slots of the dense buffer.

    The host knows how many tokens each head holds. Which ones they are, the device knows: looking at them there waits
    for nothing.

    Attributes:
        storage: the storage that holds the tokens; the view is valid until the storage changes.
        rows: the sequences, ``[b]``.
        counts: int64 ``[b, Hkv]`` on the host, the tokens that each head holds.
    """

    storage: PagedStorage
    rows: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, storage: PagedStorage, rows: np.ndarray) -> TokenView:
        """The tokens of the sequences ``rows`` of ``storage``, which use equally many slots of the dense buffer."""
        table, used = storage.table, int(storage.dense.lengths[rows[0]])
        table_rows = table.rows_of(rows)
        columns = int(table.lengths[table_rows].max(initial=0))
        paged = table.counts(table_rows, columns).sum(1, dtype=np.int64)
        return cls(storage, rows, used + paged.reshape(len(rows), storage.heads))

    @cached_property
    def used(self) -> int:
        """Dense slots that each of the sequences uses."""
        return int(self.storage.dense.lengths[self.rows[0]])

    @cached_property
    def tokens(self) -> int:
        """Tokens of the head that holds most."""
        return int(self.counts.max(initial=0))

    @cached_property
    def columns(self) -> int:
        """Pages of the head that has most."""
        return int(self.storage.table.lengths[self.storage.table.rows_of(self.rows)].max(initial=0))

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(b, Hkv, T)``."""
        return len(self.rows), self.storage.heads, self.tokens

    @cached_property
    def everywhere(self) -> bool:
        """Whether all heads hold equally many tokens."""
        return bool((self.counts == self.tokens).all())

    @cached_property
    def counts_on_device(self) -> torch.Tensor:
        """:attr:`counts` on the storage's device, ``[b, Hkv, 1]``."""
        return to_device(self.counts, self._device)[..., None]

    @cached_property
    def slots(self) -> torch.Tensor:
        """int64 ``[b, Hkv, T]``: a slot of the dense buffer, or ``dense slots + column * P + place`` in a page."""
        return self._arranged(torch.arange(self.used + self.columns * self.storage.page_size, device=self._device))

    @cached_property
    def page(self) -> torch.Tensor:
        """int64 ``[b, Hkv, T]``, the page column of each token; the number of columns for those of the dense buffer."""
        behind = self.slots - self.used
        return (behind // self.storage.page_size).masked_fill(behind < 0, self.columns)

    @cached_property
    def exists(self) -> torch.Tensor:
        """bool ``[b, Hkv, T]``, False behind the last token of a head that holds fewer."""
        if self.everywhere:
            return torch.ones((), dtype=torch.bool, device=self._device).expand(self.shape)
        return torch.arange(self.tokens, device=self._device) < self.counts_on_device

    @cached_property
    def positions(self) -> torch.Tensor:
        """int64 ``[b, Hkv, T]``, original positions, ``NOWHERE`` where there is no token."""
        storage, device = self.storage, self._device
        sinks = min(self.used, storage.sink_length)
        at = storage.dense.positions[self.rows, : self.used]
        # Nothing was dropped between them, or sinks and tail stand apart.
        together = len(at) == 1 and self.used > 0 and int(at[0, -1]) - int(at[0, 0]) == self.used - 1
        parts = [at] if together else [at[:, :sinks], at[:, sinks:]]
        dense = [ascending_on(device, part) for part in parts]
        positions = (dense[0] if together else torch.cat(dense, 1))[:, None].expand(-1, storage.heads, -1)
        if self.columns:
            table_rows = storage.table.rows_of(self.rows)
            paged = storage.table.positions(0, self.columns, storage.page_size, table_rows)
            positions = torch.cat([positions, to_device(paged.reshape(*self.shape[:2], -1), device)], 2)
        arranged = self._arranged(positions)
        return arranged if self.everywhere else arranged.masked_fill(~self.exists, NOWHERE)

    def pick(self, by_slot: torch.Tensor) -> torch.Tensor:
        """``by_slot [b, Hkv, dense slots + columns * P]`` in the order of the tokens, 0 where there is none."""
        picked = self._arranged(by_slot)
        return picked if self.everywhere else picked.masked_fill(~self.exists, 0)

    def states(self, side: str) -> torch.Tensor:
        """Keys or values, float32 ``[b, Hkv, T, D]``, decoded; 0 where there is no token."""
        dense = rows_of(getattr(self.storage.dense, side)[:, :, : self.used], self.rows)
        packed = self._decoded(side)
        if packed is None:  # all of it lies in the order of its tokens already
            return dense.float()
        whole = torch.cat([dense.float(), packed], 2)
        picked = whole.gather(2, self._index.unsqueeze(-1).expand(-1, -1, -1, whole.shape[-1]))
        return picked if self.everywhere else picked.masked_fill_(~self.exists.unsqueeze(-1), 0)

    def bias(self) -> torch.Tensor | None:
        """What is added to the scores of each token, float32 ``[b, Hkv, T]``; None where pages hold no bias."""
        if not self.storage.layout.biased:
            return None
        by_slot = torch.zeros(*self.shape[:2], self.used, dtype=torch.float32, device=self._device)
        if self.columns:
            packed = self.storage.layout.view(self._records(), BIAS)
            assert packed is not None
            packed = packed.float().transpose(0, 1).reshape(*self.shape[:2], -1)
            by_slot = torch.cat([by_slot, packed], 2)
        return self.pick(by_slot)

    def in_sparse_pages(self, keep: torch.Tensor, protected: torch.Tensor) -> torch.Tensor:
        """Tokens of pages that would be left with few of their tokens, none of them protected; all ``[b, Hkv, T]``."""
        size, columns, page = self.storage.page_size, self.columns, self.page

        def per_page(mask: torch.Tensor) -> torch.Tensor:
            counts = torch.zeros(*mask.shape[:2], columns + 1, dtype=torch.int64, device=mask.device)
            return counts.scatter_add_(2, page, mask.long())

        kept = per_page(keep & self.exists)
        sparse = (kept < _SPARSE * size) & (kept < per_page(self.exists)) & (per_page(protected) == 0)
        sparse[..., columns] = False
        return sparse.gather(2, page)

    @property
    def _device(self) -> torch.device:
        return self.storage.device

    @cached_property
    def _index(self) -> torch.Tensor:
        """:attr:`slots`, 0 where there is no token."""
        return self.slots if self.everywhere else self.slots.masked_fill(~self.exists, 0)

    @cached_property
    def _order(self) -> torch.Tensor | None:
        """Which places of sinks, pages and tail hold the tokens, ``[b, Hkv, T]``; None if all of them do."""
        storage, used, size, device = self.storage, self.used, self.storage.page_size, self._device
        table_rows = storage.table.rows_of(self.rows)
        counts = storage.table.counts(table_rows, self.columns)
        if (counts == size).all():
            return None
        sinks, shape = min(used, storage.sink_length), self.shape[:2]
        paged = torch.arange(size, device=device) < to_device(counts, device)[:, :, None]
        dense = torch.ones(*shape, used, dtype=torch.bool, device=device)
        present = torch.cat([dense[..., :sinks], paged.reshape(*shape, -1), dense[..., sinks:]], 2)
        return front(present, self.tokens)

    def _arranged(self, by_slot: torch.Tensor) -> torch.Tensor:
        """``by_slot [..., dense slots + columns * P]`` as ``[b, Hkv, T]`` in the order of tokens."""
        used, sinks = self.used, min(self.used, self.storage.sink_length)
        if self.columns:
            parts = by_slot[..., :sinks], by_slot[..., used:], by_slot[..., sinks:used]
            by_slot = torch.cat(parts, -1)
        by_slot = by_slot.expand(*self.shape[:2], -1)
        return by_slot if self._order is None else by_slot.gather(2, self._order)

    def _decoded(self, side: str) -> torch.Tensor | None:
        """The pages of the sequences, ``[b, Hkv, columns * P, D]``; arbitrary where a row has no page."""
        storage, columns = self.storage, self.columns
        if columns == 0:
            return None
        records = self._records()
        shape = (*records.shape[:2], storage.page_size, storage.layout.sides[side].dim)
        buffer = torch.empty(shape, dtype=torch.float32, device=storage.device)
        mean, scale = storage.writer.basis.by_row(self.rows)
        tokens = storage.encoder.decode(side, records, mean, buffer, scale)
        return tokens.unflatten(0, (len(self.rows), storage.heads))

    def _records(self) -> torch.Tensor:
        """The pages of the sequences, ``[columns, b * Hkv, record_bytes]``; any page where a row has none."""
        table = self.storage.table
        # A column of pages at a time, as they are stored, so that they lie side by side.
        ids = table.ids(table.rows_of(self.rows), self.columns).T
        return self.storage.pool.read(np.where(ids >= 0, ids, ids.max()).flatten()).unflatten(0, ids.shape)
