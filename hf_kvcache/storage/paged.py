"""A layer's tokens: pages in a pool, a table of them per KV head, and a full-precision buffer of sinks and tail."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels.inputs import Pages
from hf_kvcache.kernels.workspace import scratch
from hf_kvcache.storage.dense_buffer import DenseBuffer
from hf_kvcache.storage.fetching import PageFetch, PageSource
from hf_kvcache.storage.integrity import IntegrityError
from hf_kvcache.storage.page_reader import PageReader
from hf_kvcache.storage.page_table import PageTable, page_spans
from hf_kvcache.storage.page_writer import PageWriter
from hf_kvcache.storage.pool import PagePool
from hf_kvcache.storage.serialization import export_pages, export_storage, import_pages, import_storage
from hf_kvcache.storage.table_integrity import check_table
from hf_kvcache.storage.transfers import tokens_of


class PagedStorage:
    """Keys and values of one layer for ``B`` sequences.

    The first ``sink_length`` tokens of a sequence stay in full precision, and so do the newest: once the tail holds
    ``tail_length + page_size`` tokens, its oldest ``page_size`` become a page. Where a page begins and when it is
    packed depends on nothing but the number of non-padding tokens, so a row of a padded batch packs as it would alone.

    Args:
        encoder: makes page records.
        keys: a tensor whose batch, heads, dtype and device the storage takes, ``[B, Hkv, T, Dk]``.
        values: the same for values.
        sink_length: tokens at the start that are never packed.
        tail_length: newest tokens that are never packed.
        spare: tokens beyond these that the dense buffer has room for; a page's by default.
        outside: where pages lie outside of the device, and the number of the layer among those whose pages do; None
            if they lie on the device.

    Attributes:
        dense: sinks and tail; the dense buffer alone knows how many of them each sequence holds.
        table: which pages each KV head holds; the table alone knows how many tokens they count.
        writer: makes pages of tokens that leave the dense buffer.
        reader: gives the pages to kernels.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        encoder: PageEncoder,
        keys: torch.Tensor,
        values: torch.Tensor,
        sink_length: int,
        tail_length: int,
        spare: int | None = None,
        outside: tuple[PageSource, int] | None = None,
    ) -> None:
        self.encoder = encoder
        self.layout = encoder.layout
        self.page_size = self.layout.page_size
        self.batch, self.heads = keys.shape[:2]
        self.device, self.dtype = keys.device, keys.dtype
        target, place = outside or (None, 0)
        self.reader = PageReader(self.layout, None if target is None else PageFetch(target, place, keys.device))
        self.pool = PagePool(self.layout.record_bytes, keys.device, target)
        self.table = PageTable(self.pool, self.batch, self.heads // encoder.group)
        capacity = sink_length + tail_length + (self.page_size if spare is None else spare)
        self.dense = DenseBuffer(keys, values, sink_length, capacity)
        self.writer = PageWriter(encoder, self.table, self.dense, tail_length)

    # -- what the parts know --------------------------------------------------------------------------------------

    @property
    def sink_length(self) -> int:
        """Tokens at the start of a sequence that are never packed."""
        return self.dense.sink_length

    @property
    def tail_length(self) -> int:
        """Newest tokens of a sequence that are never packed."""
        return self.writer.tail_length

    @property
    def ahead(self) -> int:
        """Pages at the end of every row of the table whose tokens are in the dense buffer too, until confirmed."""
        return self.writer.ahead

    @property
    def key_mean(self) -> torch.Tensor | None:
        """Float32 ``[B, page heads, dim]``, in the rotated basis; None if keys are packed as they are."""
        return self.writer.basis.mean

    # -- writing --------------------------------------------------------------------------------------------------

    def append_one(self, keys: torch.Tensor, values: torch.Tensor, position: int, valid: np.ndarray | None) -> None:
        """Append a token ``[B, Hkv, 1, D]`` to each sequence that ``valid [B]`` does not mark as padding."""
        self.dense.append_one(keys, values, position, valid)

    def append_block(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        position: int,
        valid: np.ndarray | None,
        pack: bool = True,
        keep_from: int = 0,
    ) -> None:
        """Append ``T`` tokens at positions ``position ...`` and pack what is due.

        Args:
            keys: ``[B, Hkv, T, Dk]``.
            values: ``[B, Hkv, T, Dv]``.
            position: position of the first token.
            valid: bool ``[B, T]``, False for padding; None if no token is padding.
            pack: whether full pages may be packed already.
            keep_from: tokens before this position need not be kept (sliding windows).
        """
        positions = np.arange(position, position + keys.shape[2])
        if valid is None and self.dense.uniform_length is not None:
            self._append_rows(slice(None), keys, values, positions, pack, keep_from)
            self.writer.basis.settle()
            return
        for row in range(self.batch):
            held = np.arange(keys.shape[2]) if valid is None else np.flatnonzero(valid[row])
            new_keys, new_values = (tokens_of(x[row : row + 1], held) for x in (keys, values))
            self._append_rows(slice(row, row + 1), new_keys, new_values, positions[held], pack, keep_from)
        self.writer.basis.settle()

    def due(self, slots: Any) -> Any:
        """How many pages are to be packed once ``slots`` slots of the dense buffer are in use."""
        return self.writer.due(slots)

    def pack_due(self, keep_from: int = 0) -> None:
        """Pack every page that is due; tokens before position ``keep_from`` may be dropped instead."""
        self.writer.pack_due(keep_from, self.as_packed)

    def pack_ahead(self, pages: int) -> None:
        """Encode the oldest tail tokens into ``pages`` pages in all, but keep the tokens until they are confirmed."""
        self.writer.pack_ahead(pages, self.as_packed)

    def commit_ahead(self) -> None:
        """Keep the pages packed ahead that are due by now, and their tokens only there; forget the other pages."""
        self.writer.commit_ahead()

    def as_packed(self, rows: np.ndarray, keys: torch.Tensor, positions: np.ndarray) -> torch.Tensor:
        """What pages hold of ``keys [b, Hkv, n, Dk]`` of the sequences ``rows`` at ``positions [b, n]``."""
        return keys

    def truncate_from(self, position: int) -> None:
        """Forget the tokens at ``position`` and after."""
        self.dense.truncate_from(position)
        self.commit_ahead()
        self.table.truncate_from(position)
        self.writer.note_truncated()

    def drop_before(self, position: int) -> None:
        """Forget leading pages whose tokens all stand before ``position`` (sliding windows)."""
        lost = self.table.drop_before(position)
        if lost is not None:
            self.writer.lost_before = max(self.writer.lost_before, lost + 1)

    # -- copies ---------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def select(self, rows: np.ndarray) -> None:
        """Replace the sequences by ``rows`` of them, which may repeat: table work, pages are shared."""
        self.table.select(rows)
        self.dense.select(rows)
        self.writer.select(rows)
        self.batch = len(rows)

    @torch.inference_mode(False)
    def fork(self) -> PagedStorage:
        """A second storage over the same pages, with a copy of the dense buffer."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.table, other.dense = self.table.fork(), self.dense.fork()
        other.reader = self.reader.fork()
        other.writer = self.writer.fork(other.table, other.dense)
        return other

    def __getstate__(self) -> dict[str, Any]:
        # The pool may hold pages of forks, at addresses of this process: only one's own pages go along.
        left_out = ("pool", "table")
        state = {name: value for name, value in self.__dict__.items() if name not in left_out}
        return state | {"saved_pages": export_pages(self.table)}

    @torch.inference_mode(False)
    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("saved_pages")
        self.__dict__.update(state)
        fetch = self.reader.fetch
        self.pool = PagePool(self.layout.record_bytes, self.device, None if fetch is None else fetch.target)
        self.table = self.writer.table = PageTable(self.pool, self.batch, self.heads // self.encoder.group)
        import_pages(self.table, saved)

    def state(self) -> dict[str, torch.Tensor]:
        """The contents as tensors: each page once, the table as indices into them, and the dense tokens."""
        return export_storage(self.table, self.dense, self.writer)

    def restore(self, state: dict[str, torch.Tensor], owned: bool = False) -> None:
        """Fill a fresh storage with what :meth:`state` returned.

        Args:
            state: the tensors.
            owned: whether nobody else has them; then those on the device of the storage are not copied.
        """
        import_storage(self.table, self.dense, self.writer, state, owned)

    # -- reading --------------------------------------------------------------------------------------------------

    def pages(self, ahead: int = 0, fetch: bool = True) -> Pages | None:
        """The pages as kernels read them, ``ahead`` of those packed ahead among them; None if there are none.

        While nothing changes, it is the same object. Without ``fetch``, pages outside of the device have no records.
        """
        pages = (self.reader.read if fetch else self.reader.unfetched)(self.table, self.writer.basis)
        if ahead == self.writer.ahead or pages is None:
            return pages
        columns = pages.columns - self.writer.ahead + ahead
        return pages.until(columns) if columns else None

    def decoded(self, side: str, pages: Pages, records: torch.Tensor, first: int) -> torch.Tensor:
        """Keys or values of some of the pages as the model made them, but for rounding.

        Args:
            side: ``"keys"`` or ``"values"``.
            pages: what :meth:`pages` returned.
            records: its records of ``C`` columns, ``[C, rows, record_bytes]``.
            first: the first of these columns.

        Returns:
            Float32 ``[B * Hkv, C * P, D]``; valid until the next call on this thread.
        """
        shape = (*records.shape[:2], self.page_size, self.layout.sides[side].dim)
        buffer = scratch(side, shape, torch.float32, self.device)
        return self.encoder.decode(side, records, pages.key_mean, buffer, pages.key_scale)

    def tokens(self) -> np.ndarray:
        """Non-padding tokens held by each sequence."""
        in_pages = self.table.tokens()[:: self.table.heads]
        return in_pages + self.dense.lengths - self.ahead * self.page_size

    def check(self) -> None:
        """Raise IntegrityError if an invariant is broken."""
        self.pool.check()
        check_table(self.table, self.page_size)
        self.dense.check()
        _check_order(self.table, self.dense, self.ahead, self.page_size)

    # -- internals ------------------------------------------------------------------------------------------------

    def _append_rows(
        self,
        rows: slice,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: np.ndarray,
        pack: bool,
        keep_from: int,
    ) -> None:
        """Append tokens to sequences that hold equally many."""
        dense, held = self.dense, int(self.dense.lengths[rows][0])
        positions = np.broadcast_to(positions, (keys.shape[0], len(positions)))
        if held:
            keys = torch.cat([dense.keys[rows, :, :held], keys], 2)
            values = torch.cat([dense.values[rows, :, :held], values], 2)
            positions = np.concatenate([dense.positions[rows, :held], positions], 1)
        if pack:
            numbers = np.arange(self.batch)[rows]
            keys, values, positions = self.writer.pack_new(numbers, keys, values, positions, keep_from, self.as_packed)
        dense.store(rows, keys, values, positions)
        if pack:
            dense.shrink()


def _check_order(table: PageTable, dense: DenseBuffer, ahead: int, page_size: int) -> None:
    """Raise IntegrityError unless sinks stand before pages, and pages before the tail that is not packed ahead."""
    for row, (start, stop) in enumerate(page_spans(table, ahead, page_size)):
        length = int(dense.lengths[row])
        sinks = dense.positions[row, : min(length, dense.sink_length)]
        tail = dense.positions[row, dense.sink_length + ahead * page_size : length]
        if start <= stop and ((sinks >= start).any() or (tail <= stop).any()):
            raise IntegrityError(f"sequence {row}: sinks, pages and tail overlap")
