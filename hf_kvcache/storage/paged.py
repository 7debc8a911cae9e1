"""A layer's tokens: pages in a pool, a table of them per KV head, and a full-precision buffer of sinks and tail."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch

from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels.inputs import Pages
from hf_kvcache.kernels.workspace import scratch
from hf_kvcache.storage.dense_buffer import DenseBuffer
from hf_kvcache.storage.integrity import IntegrityError
from hf_kvcache.storage.page_table import PageTable
from hf_kvcache.storage.pool import PagePool
from hf_kvcache.storage.serialization import export_pages, import_pages

#: Elements encoded at a time: few enough that a codec's many passes over them stay in a core's cache.
_ENCODE_ELEMENTS = 1 << 19
#: A position later than any.
_NOWHERE = np.iinfo(np.int64).max // 2


P = ParamSpec("P")
T = TypeVar("T")


def _in_full_precision(method: Callable[Concatenate[PagedStorage, P], T]) -> Callable[Concatenate[PagedStorage, P], T]:
    """``method`` outside of autocast, which would round what is packed before it is."""

    @functools.wraps(method)
    def call(self: PagedStorage, *args: P.args, **kwargs: P.kwargs) -> T:
        with torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return call


class PagedStorage:
    """Keys and values of one layer for ``B`` sequences.

    The first ``sink_length`` tokens of a sequence stay in full precision, and so do the newest: once the tail holds
    ``tail_length + page_size`` tokens, its oldest ``page_size`` become a page. Where a page begins and when it is
    packed depends on nothing but the number of real tokens, so a row of a padded batch packs as it would alone.

    Args:
        encoder: makes page records.
        keys: a tensor whose batch, heads, dtype and device the storage takes, ``[B, Hkv, T, Dk]``.
        values: the same for values.
        sink_length: tokens at the start that are never packed.
        tail_length: newest tokens that are never packed.
        spare: tokens beyond these that the dense buffer has room for; a page's by default.
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
    ) -> None:
        self.encoder = encoder
        self.layout = encoder.layout
        self.page_size = self.layout.page_size
        self.sink_length, self.tail_length = sink_length, tail_length
        self.batch, self.heads = keys.shape[:2]
        #: Rows of the table and of ``Pages`` that a sequence has: one for the KV heads that share a record.
        self.page_heads = self.heads // encoder.group
        self.device, self.dtype = keys.device, keys.dtype
        self.pool = PagePool(self.layout.record_bytes, keys.device)
        self.table = PageTable(self.pool, self.batch * self.page_heads)
        self._capacity = sink_length + tail_length + (self.page_size if spare is None else spare)
        self.dense = DenseBuffer(keys, values, sink_length, self._capacity)
        #: Pages at the end of the table whose tokens are still in the dense buffer too, until they are confirmed.
        self.ahead = 0
        #: No token before this position need be held any more (sliding windows).
        self.lost_before = 0
        self.key_mean: torch.Tensor | None = None  # [B, page heads, dim] float32, in the rotated basis
        self._key_mean_known = np.zeros(self.batch, dtype=bool)
        if encoder.centered:
            dim = self.layout.sides["keys"].dim
            self.key_mean = torch.zeros(self.batch, self.page_heads, dim, device=keys.device)
        self._pages: Pages | None = None

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
            valid: bool ``[B, T]``, False for padding; None if all tokens are real.
            pack: whether full pages may be packed already.
            keep_from: tokens before this position need not be kept (sliding windows).
        """
        positions = np.arange(position, position + keys.shape[2])
        if valid is None and self.dense.uniform_length is not None:
            self._append_rows(slice(None), keys, values, positions, pack, keep_from)
            return
        for row in range(self.batch):
            real = slice(None) if valid is None else np.flatnonzero(valid[row])
            index = real if isinstance(real, slice) else torch.from_numpy(real).to(self.device)
            new_keys, new_values = keys[row : row + 1][:, :, index], values[row : row + 1][:, :, index]
            self._append_rows(slice(row, row + 1), new_keys, new_values, positions[real], pack, keep_from)

    def pack_due(self, keep_from: int = 0) -> None:
        """Pack every page that the tail has room for."""
        if self.dense.longest < self._capacity:
            return
        due = self.due(self.dense.lengths)
        for pages in np.unique(due[due > 0]).tolist():
            rows = np.flatnonzero(due == pages)
            stop = self.sink_length + pages * self.page_size
            span = slice(self.sink_length, stop)
            whole = len(rows) == self.batch
            index = slice(None) if whole else torch.from_numpy(rows).to(self.device)
            positions = self.dense.positions[rows, span]
            self._pack(rows, self.dense.keys[index, :, span], self.dense.values[index, :, span], positions, keep_from)
            self.dense.drop_oldest(rows, pages * self.page_size)
        self.dense.shrink(self._capacity)

    def due(self, slots: Any) -> Any:
        """How many pages are to be packed once ``slots`` slots of the dense buffer are in use."""
        return np.maximum(slots - self.sink_length - self.tail_length, 0) // self.page_size

    def pack_ahead(self, pages: int) -> None:
        """Encode the oldest tail tokens into ``pages`` pages in all, but keep the tokens until they are confirmed."""
        rows = np.arange(self.batch)
        # One at a time, as plain decoding would: the first page packed fixes the key mean.
        for page in range(self.ahead, pages):
            first = self.sink_length + page * self.page_size
            span = slice(first, first + self.page_size)
            keys, values = self.dense.keys[:, :, span], self.dense.values[:, :, span]
            self._pack(rows, keys, values, self.dense.positions[:, span], 0)
        self.ahead = max(self.ahead, pages)

    def truncate_from(self, position: int) -> None:
        """Forget the tokens at ``position`` and after."""
        self.dense.truncate_from(position)
        self.commit_ahead()
        self.table.truncate_from(position)
        self._key_mean_known &= self._row_pages() > 0
        self._pages = None

    def changed(self) -> None:
        """Take note that tokens were dropped from the table or the dense buffer."""
        self._pages = None
        self.dense.shrink(self._capacity)

    def commit_ahead(self) -> None:
        """Keep the pages encoded ahead that are due by now, and their tokens only there; forget the others."""
        if self.ahead == 0:
            return
        keep = min(self.ahead, int(self.due(self.dense.lengths).min()))
        if keep < self.ahead:
            self.table.drop_last(np.arange(self.batch * self.page_heads), self.ahead - keep)
        if keep:
            self.dense.drop_oldest(np.arange(self.batch), keep * self.page_size)
        self.ahead = 0
        self._pages = None

    def drop_before(self, position: int) -> None:
        """Forget leading pages whose tokens all stand before ``position`` (sliding windows)."""
        lost = self.table.drop_before(position)
        if lost is not None:
            self.lost_before = max(self.lost_before, lost + 1)
            self._pages = None

    @torch.inference_mode(False)
    def select(self, rows: np.ndarray) -> None:
        """Replace the sequences by ``rows`` of them, which may repeat: table work, pages are shared."""
        self.table.select(self.table_rows(rows))
        self.dense.select(rows)
        if self.key_mean is not None:
            self.key_mean = self.key_mean[torch.from_numpy(rows).to(self.device)]
        self._key_mean_known = self._key_mean_known[rows]
        self.batch = len(rows)
        self._pages = None

    @torch.inference_mode(False)
    def fork(self) -> PagedStorage:
        """A second storage over the same pages, with a copy of the dense buffer."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.table, other.dense = self.table.fork(), self.dense.fork()
        other._key_mean_known = self._key_mean_known.copy()
        other.key_mean = None if self.key_mean is None else self.key_mean.clone()
        other._pages = None
        return other

    def __getstate__(self) -> dict[str, Any]:
        # The pool may hold pages of forks, at addresses of this process: only one's own pages go along.
        left_out = ("pool", "table", "_pages")
        state = {name: value for name, value in self.__dict__.items() if name not in left_out}
        return state | {"saved_pages": export_pages(self.table)}

    @torch.inference_mode(False)
    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("saved_pages")
        self.__dict__.update(state)
        self.pool = PagePool(self.layout.record_bytes, self.device)
        self.table = PageTable(self.pool, self.batch * self.page_heads)
        import_pages(self.table, saved)
        self._pages = None

    # -- reading --------------------------------------------------------------------------------------------------

    def pages(self, ahead: int = 0) -> Pages | None:
        """The pages as kernels read them, ``ahead`` of those packed ahead among them; None if there are none."""
        if self._pages is None:
            if self.table.columns == 0:
                return None
            addresses, counts, first = self.table.arrays(self.table.columns)
            key_mean = None if self.key_mean is None else self.key_mean.flatten(0, 1)
            scattered = self.table.scattered()
            slabs = self.pool.slabs()
            self._pages = Pages(self.layout, slabs, addresses, counts, first, scattered, key_mean, self.page_heads)
        if ahead == self.ahead:
            return self._pages
        columns = self._pages.columns - self.ahead + ahead
        return self._pages.until(columns) if columns else None

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
        return self.encoder.decode(side, records, pages.key_mean, buffer)

    def tokens(self) -> np.ndarray:
        """Real tokens held by each sequence."""
        pages = self.table.tokens().reshape(self.batch, self.page_heads)[:, 0]
        return pages + self.dense.lengths - self.ahead * self.page_size

    def check(self) -> None:
        """Raise IntegrityError if an invariant is broken."""
        self.pool.check()
        self.table.check(self.page_size)
        self.dense.check()
        for row, (start, stop) in enumerate(self._page_span()):
            length = int(self.dense.lengths[row])
            sinks = self.dense.positions[row, : min(length, self.sink_length)]
            tail = self.dense.positions[row, self.sink_length + self.ahead * self.page_size : length]
            if start <= stop and ((sinks >= start).any() or (tail <= stop).any()):
                raise IntegrityError(f"sequence {row}: sinks, pages and tail overlap")

    # -- accounting and export ------------------------------------------------------------------------------------

    def memory(self) -> dict[str, int]:
        """Bytes held, by part; pages shared with a fork count in both."""
        pages = len(np.unique(self.table.page_ids()))
        slot = self.heads * (self.dense.keys.shape[3] + self.dense.values.shape[3]) * self.dtype.itemsize
        sinks = int(np.minimum(self.dense.lengths, self.sink_length).sum())
        tail = int(self.dense.lengths.sum()) - sinks
        padding = self.layout.record_bytes - self.layout.code_bytes - self.layout.scale_bytes
        unused = (self.batch * self.dense.capacity - sinks - tail) * slot
        key_mean = 0 if self.key_mean is None else self.key_mean.numel() * self.key_mean.element_size()
        return {
            "codes": pages * self.layout.code_bytes,
            "scales": pages * self.layout.scale_bytes,
            "sinks": sinks * slot,
            "tail": tail * slot,
            "tables": self.table.nbytes + self.dense.positions.nbytes + self.dense.lengths.nbytes + key_mean,
            "slack": pages * padding + self.pool.free_pages * self.layout.record_bytes + unused,
        }

    def packed_elements(self) -> int:
        """Elements of the model's keys and values that pages stand for, each page once."""
        elements = self.page_size * self.encoder.group * sum(self.encoder.widths.values())
        return len(np.unique(self.table.page_ids())) * elements

    def state(self) -> dict[str, torch.Tensor]:
        """The contents as tensors: each page once, the table as indices into them, and the dense tokens."""
        held = self.dense.longest
        state = export_pages(self.table) | {
            "ahead": torch.tensor(self.ahead),
            "dense.keys": self.dense.keys[:, :, :held].clone(),
            "dense.values": self.dense.values[:, :, :held].clone(),
            "dense.positions": torch.from_numpy(self.dense.positions[:, :held].copy()),
            "dense.lengths": torch.from_numpy(self.dense.lengths.copy()),
        }
        if self.key_mean is not None:
            state["center"] = self.key_mean.clone()
            state["center_known"] = torch.from_numpy(self._key_mean_known.copy())
        return state

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Fill a fresh storage with what :meth:`state` returned."""
        import_pages(self.table, state)
        self.ahead = int(state["ahead"])
        keys, values = state["dense.keys"].to(self.device), state["dense.values"].to(self.device)
        self.dense.store(slice(None), keys, values, state["dense.positions"].numpy())
        self.dense.set_lengths(state["dense.lengths"].numpy())
        if self.key_mean is not None:
            self.key_mean = state["center"].to(self.device)
            self._key_mean_known = state["center_known"].numpy().copy()

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
        held = int(self.dense.lengths[rows][0])
        positions = np.broadcast_to(positions, (keys.shape[0], len(positions)))
        if held:
            keys = torch.cat([self.dense.keys[rows, :, :held], keys], 2)
            values = torch.cat([self.dense.values[rows, :, :held], values], 2)
            positions = np.concatenate([self.dense.positions[rows, :held], positions], 1)
        pages = int(self.due(keys.shape[2])) if pack else 0
        if pages:
            start, stop = self.sink_length, self.sink_length + pages * self.page_size
            numbers = np.arange(self.batch)[rows]
            self._pack(numbers, keys[:, :, start:stop], values[:, :, start:stop], positions[:, start:stop], keep_from)
            keys = torch.cat([keys[:, :, :start], keys[:, :, stop:]], 2)
            values = torch.cat([values[:, :, :start], values[:, :, stop:]], 2)
            positions = np.concatenate([positions[:, :start], positions[:, stop:]], 1)
        self.dense.store(rows, keys, values, positions)
        if pack:
            self.dense.shrink(self._capacity)

    @_in_full_precision
    def _pack(
        self, rows: np.ndarray, keys: torch.Tensor, values: torch.Tensor, positions: np.ndarray, keep_from: int
    ) -> None:
        """Make pages of ``keys [b, Hkv, n * P, Dk]`` and append them to the table of the sequences ``rows``."""
        stale = (positions[:, self.page_size - 1 :: self.page_size] < keep_from).sum(1)
        if (stale != stale[0]).any():
            for i in range(len(rows)):
                one = slice(i, i + 1)
                self._pack(rows[one], keys[one], values[one], positions[one], keep_from)
            return
        skip = int(stale[0]) * self.page_size
        if skip:
            self.lost_before = max(self.lost_before, int(positions[:, skip - 1].max()) + 1)
        keys, values, positions = keys[:, :, skip:], values[:, :, skip:], positions[:, skip:]
        pages = keys.shape[2] // self.page_size
        if pages == 0:
            return
        keys = self.unplaced(rows, keys, positions)
        if self.key_mean is not None and not self._key_mean_known[rows].all():
            self.fix_key_mean(rows, self.encoder.key_mean_of(keys.float().mean(2)))
        table_rows = self.table_rows(rows)
        # Column by column, so that the pages that are read together lie together.
        ids = self.pool.allocate(pages * len(table_rows)).reshape(pages, len(table_rows))
        for start, stop, records in self.encode(rows, keys, values):
            self.pool.write(ids[start:stop].flatten(), records)
        paged = positions.reshape(len(rows), pages, self.page_size)
        self._note_positions(paged, ids)
        self.table.append(table_rows, ids.T, paged[:, :, 0].repeat(self.page_heads, 0), self.page_size)
        self._pages = None

    def encode(
        self, rows: np.ndarray, keys: torch.Tensor, values: torch.Tensor
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Records of page columns ``[start, stop)``, a bounded number at a time."""
        key_mean = None
        if self.key_mean is not None:
            key_mean = self.key_mean[torch.from_numpy(rows).to(self.device)].flatten(0, 1)
        pages = keys.shape[2] // self.page_size
        step = max(1, _ENCODE_ELEMENTS // (keys.shape[0] * self.heads * self.page_size * keys.shape[3]))
        for start in range(0, pages, step):
            stop = min(start + step, pages)
            span = slice(start * self.page_size, stop * self.page_size)
            columns = [
                x[:, :, span].unflatten(2, (-1, self.page_size)).permute(2, 0, 1, 3, 4).flatten(0, 2)
                for x in (keys, values)
            ]
            repeated = None if key_mean is None else key_mean.repeat(stop - start, 1)
            yield start, stop, self.encoder.encode(columns[0], columns[1], repeated)

    def unplaced(self, rows: np.ndarray, keys: torch.Tensor, positions: np.ndarray) -> torch.Tensor:
        """``keys [b, Hkv, n, Dk]`` of the sequences ``rows`` at ``positions [b, n]`` as the encoder takes them."""
        return keys

    def fix_key_mean(self, rows: np.ndarray, mean: torch.Tensor) -> None:
        """Take ``mean [b, page heads, dim]``, of the first keys that are packed, as the key mean; it never changes."""
        new = np.flatnonzero(~self._key_mean_known[rows])
        if self.key_mean is None or len(new) == 0:
            return
        index = torch.from_numpy(new).to(self.device)
        self.key_mean[torch.from_numpy(rows[new]).to(self.device)] = mean[index].to(self.key_mean.dtype)
        self._key_mean_known[rows] = True

    def _note_positions(self, positions: np.ndarray, ids: np.ndarray) -> None:
        """Remember every position of the pages whose tokens do not stand side by side."""
        scattered = positions[:, :, -1] - positions[:, :, 0] != self.page_size - 1
        for row, column in np.argwhere(scattered).tolist():
            for page in ids[column, row * self.page_heads : (row + 1) * self.page_heads].tolist():
                self.pool.note_positions(page, positions[row, column].copy())

    def table_rows(self, rows: np.ndarray) -> np.ndarray:
        """The rows of the table, and of ``Pages``, of the sequences ``rows``, side by side."""
        return (rows[:, None] * self.page_heads + np.arange(self.page_heads)).flatten()

    def _row_pages(self) -> np.ndarray:
        return self.table.lengths.reshape(self.batch, self.page_heads)[:, 0]

    def _page_span(self) -> list[tuple[int, int]]:
        """First and last position in the pages of each sequence, over its heads (``(0, -1)`` without pages)."""
        columns = self.table.columns
        positions = self.table.positions(0, columns, self.page_size)
        _, counts, _ = self.table.arrays(columns)
        first, last = [], []
        for row, length in enumerate((self.table.lengths - self.ahead).tolist()):
            first.append(int(positions[row, 0, 0]) if length > 0 else _NOWHERE)
            last.append(int(positions[row, length - 1, counts[row, length - 1] - 1]) if length > 0 else -1)
        spans = zip(*(np.reshape(x, (self.batch, self.page_heads)) for x in (first, last)), strict=True)
        return [(int(a.min()), int(b.max())) if b.max() >= 0 else (0, -1) for a, b in spans]
