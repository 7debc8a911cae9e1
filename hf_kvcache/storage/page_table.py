"""The page table: which pages each row holds, in order. A row is the KV heads of a sequence that share records."""

from __future__ import annotations

import itertools
import sys
from typing import Any
from weakref import WeakSet

import numpy as np

from hf_kvcache.kernels.device_table import ResidentTable
from hf_kvcache.storage.pool import PagePool

#: The position of a place without a token: later than any.
NOWHERE = np.iinfo(np.int64).max // 2
#: The id where a row has no page.
NO_PAGE = -1
#: No two states of any two tables have the same version.
_VERSIONS = itertools.count()


class ColumnFollower:
    """An object that holds something for every column of a page table, and makes it anew where the table has changed.

    Attributes:
        same: columns, from the first on, that have not changed since the object was brought up to date.
    """

    same = 0

    def note(self, column: int) -> None:
        """Note that columns from ``column`` on may have changed."""
        self.same = min(self.same, column)

    def select(self, rows: np.ndarray) -> None:
        """Take over that the rows of the table are now ``rows`` of them, which may repeat."""
        self.same = 0


class PageTable:
    """Page ids, record addresses, token counts and first positions per row, on the host.

    Args:
        pool: where the pages are; the table holds references there.
        sequences: number of sequences.
        heads: rows of each sequence, side by side.

    Attributes:
        version: a number that every method that changes the table raises; no two tables ever have the same.
        lengths: int64 ``[rows]``, pages in each row.
        resident: the table on the device of the pages, which follows this one.
        followers: what else follows this table; held weakly.
    """

    def __init__(self, pool: PagePool, sequences: int, heads: int = 1) -> None:
        self.pool, self.heads = pool, heads
        rows = sequences * heads
        self.version = next(_VERSIONS)
        self.resident = ResidentTable(self.version)
        self.followers: WeakSet[ColumnFollower] = WeakSet()
        self.lengths = np.zeros(rows, dtype=np.int64)
        self._ids = np.full((rows, 0), NO_PAGE, dtype=np.int64)
        self._addresses = np.zeros((rows, 0), dtype=np.int64)  # of the records
        self._counts = np.zeros((rows, 0), dtype=np.int32)  # tokens of each page that count: fewer after a crop
        self._first = np.zeros((rows, 0), dtype=np.int64)
        pool.add_holder(self)

    @property
    def columns(self) -> int:
        """Pages in the longest row."""
        return int(self.lengths.max(initial=0))

    @property
    def nbytes(self) -> int:
        positions = sum(stored.nbytes for stored in list(self.pool.positions.values()))
        arrays = (self._ids, self._addresses, self._counts, self._first, self.lengths)
        return sum(array.nbytes for array in arrays) + positions + self.resident.nbytes

    def rows_of(self, sequences: np.ndarray) -> np.ndarray:
        """The rows of ``sequences``, those of each sequence side by side."""
        return (sequences[:, None] * self.heads + np.arange(self.heads)).flatten()

    def page_ids(self) -> np.ndarray:
        """All ids in the table, one per reference."""
        return self._ids[self._ids != NO_PAGE]

    def tokens(self) -> np.ndarray:
        """Tokens held in the pages of each row."""
        return self._counts.sum(1, dtype=np.int64)

    def arrays(self, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Addresses of the records (0 where a row has no page), counts and first positions of columns ``[0, stop)``.

        Views, ``[rows, stop]`` each, that later appends do not change.
        """
        return self._addresses[:, :stop], self._counts[:, :stop], self._first[:, :stop]

    def ids(self, rows: np.ndarray, columns: int) -> np.ndarray:
        """A copy of the ids of columns ``[0, columns)`` of ``rows``, ``-1`` where a row has no page."""
        return self._ids[rows, :columns]

    def counts(self, rows: np.ndarray, columns: int) -> np.ndarray:
        """A copy of the token counts of columns ``[0, columns)`` of ``rows``."""
        return self._counts[rows, :columns]

    def scattered(self) -> dict[tuple[int, int], np.ndarray]:
        """Positions of the pages whose tokens do not stand side by side, by row and column."""
        return {at: self.pool.positions[int(self._ids[at])] for at in self._explicit_cells()}

    def replace(self, rows: np.ndarray, ids: np.ndarray, counts: np.ndarray, first: np.ndarray) -> None:
        """Make ``ids [len(rows), n]`` all the pages of ``rows``; those behind a row's last page are ``-1``.

        References of ids that the rows held before stay with the table, those of new ids pass to it.
        """
        old = self._ids[rows]
        # Row by row: a page may be shared by several of them, of which one keeps it and another does not.
        stays = (old[:, :, None] == ids[:, None, :]).any(2)
        released = old[~stays & (old != NO_PAGE)]
        self._reserve(ids.shape[1])
        places = ((self._ids, ids, NO_PAGE), (self._addresses, self._addresses_of(ids), 0))
        for array, new, none in (*places, (self._counts, counts, 0), (self._first, first, 0)):
            array[rows] = none
            array[rows, : ids.shape[1]] = new
        self.lengths[rows] = (ids != NO_PAGE).sum(1)
        self._changed()
        self.pool.release(released)

    def append(self, rows: np.ndarray, ids: np.ndarray, addresses: np.ndarray, first: np.ndarray, count: int) -> None:
        """Append full pages, whose references pass to the table.

        Args:
            rows: of the table, ascending.
            ids: of the pages, ``[len(rows), n]``.
            addresses: of their records, of the same shape.
            first: position of the first token of each.
            count: tokens that each of them holds.
        """
        added, held = ids.shape[1], self.lengths[rows]
        start, longest = (int(held.min()), int(held.max())) if len(rows) else (self.columns, 0)
        self._reserve(longest + added)
        where: tuple[Any, Any] = rows[:, None], held[:, None] + np.arange(added)
        if start == longest and len(rows) == len(self.lengths):
            where = slice(None), slice(start, start + added)
        self._ids[where], self._addresses[where], self._counts[where] = ids, addresses, count
        self._first[where] = first
        self.lengths[rows] += added
        self._changed(start)

    def truncate_from(self, position: int) -> None:
        """Forget the tokens at ``position`` and after; a page that loses some keeps the others."""
        counts = self._counts
        kept = np.clip(position - self._first, 0, counts)
        for row, column in self._explicit_cells():
            positions = self.pool.positions[int(self._ids[row, column])]
            kept[row, column] = min(int(counts[row, column]), int(np.searchsorted(positions, position)))
        changed = (kept != counts).any(0)
        if not changed.any():
            return
        dropped = (kept == 0) & (self._ids != NO_PAGE)
        released = self._ids[dropped]
        self._counts = kept.astype(np.int32)
        self._ids[dropped] = NO_PAGE
        self._addresses[dropped] = 0
        self.lengths = (self._ids != NO_PAGE).sum(1)
        self._changed(int(changed.argmax()))
        self.pool.release(released)

    def drop_last(self, pages: int) -> None:
        """Forget the last ``pages`` pages of each row."""
        last = np.arange(len(self.lengths))[:, None], self.lengths[:, None] - 1 - np.arange(pages)
        released = self._ids[last].flatten()
        self._ids[last] = NO_PAGE
        self._addresses[last] = 0
        self._counts[last] = 0
        self.lengths -= pages
        self._changed(int(self.lengths.min()))
        self.pool.release(released)

    def drop_before(self, position: int) -> int | None:
        """Forget leading pages all of whose tokens stand before ``position``.

        Returns:
            The position of the last token that was dropped; None if none was.
        """
        last = self._first + self._counts - 1
        for row, column in self._explicit_cells():
            last[row, column] = self.pool.positions[int(self._ids[row, column])][self._counts[row, column] - 1]
        stale = (self._ids != NO_PAGE) & (last < position)
        if not stale.any():
            return None
        lost = int(last[stale].max())
        released = self._ids[stale]
        # Positions ascend along a row, so the stale pages are a prefix of it: move the rest to the front.
        shift = stale.sum(1)
        columns = np.arange(self._ids.shape[1])[None] + shift[:, None]
        self._ids, self._addresses = _at(self._ids, columns, NO_PAGE), _at(self._addresses, columns)
        self._counts, self._first = _at(self._counts, columns), _at(self._first, columns)
        self.lengths = self.lengths - shift
        self._changed()
        self.pool.release(released)
        return lost

    def select(self, sequences: np.ndarray) -> None:
        """Replace the sequences by ``sequences`` of them, which may repeat."""
        old, rows = self.page_ids(), self.rows_of(sequences)
        self._ids, self._addresses = self._ids[rows], self._addresses[rows]
        self._counts, self._first = self._counts[rows], self._first[rows]
        self.lengths = self.lengths[rows]
        self._new_version(0)
        for follower in self.followers:
            follower.select(rows)
        # Retain before release, so that pages which stay are never freed in between.
        self.pool.retain(self.page_ids())
        self.pool.release(old)

    def fork(self) -> PageTable:
        """A second table over the same pages."""
        other = PageTable(self.pool, len(self.lengths) // self.heads, self.heads)
        other._ids, other._addresses = self._ids.copy(), self._addresses.copy()
        other._counts, other._first = self._counts.copy(), self._first.copy()
        other.lengths = self.lengths.copy()
        self.pool.retain(other.page_ids())
        return other

    def export(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copies of ids (``-1`` where there is no page), counts and first positions, ``[rows, columns]`` each."""
        columns = self.columns
        return self._ids[:, :columns].copy(), self._counts[:, :columns].copy(), self._first[:, :columns].copy()

    def restore(self, ids: np.ndarray, counts: np.ndarray, first: np.ndarray) -> None:
        """Fill an empty table with what :meth:`export` returned; freshly allocated pages have one reference so far."""
        unique = np.unique(ids[ids != NO_PAGE])
        self._ids, self._counts, self._first = ids.copy(), counts.copy(), first.copy()
        self._addresses = self._addresses_of(ids)
        self.lengths = (ids != NO_PAGE).sum(1)
        self._changed()
        self.pool.retain(self.page_ids())
        self.pool.release(unique)

    def positions(self, start: int, stop: int, page_size: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Original positions ``[rows, stop - start, page_size]``; whatever lies behind a page's count is undefined."""
        chosen = np.arange(len(self.lengths)) if rows is None else rows
        positions = self._first[chosen, start:stop, None] + np.arange(page_size)
        if self.pool.positions:
            for index, page in np.ndenumerate(self._ids[chosen, start:stop]):
                stored = self.pool.positions.get(int(page))
                if stored is not None:
                    positions[index] = stored
        return positions

    def __del__(self) -> None:
        # A fork that goes away gives its references back; at interpreter exit there is nothing left to give them to.
        if not sys.is_finalizing() and hasattr(self, "_ids"):
            self.pool.abandon(self.page_ids())

    def _changed(self, column: int = 0) -> None:
        """Note a change of columns from ``column`` on."""
        self._new_version(column)
        for follower in self.followers:
            follower.note(column)

    def _new_version(self, column: int) -> None:
        self.version = next(_VERSIONS)
        self.resident.note(self.version, column)

    def _addresses_of(self, ids: np.ndarray) -> np.ndarray:
        """Where the records of ``ids`` lie, 0 where there is no page."""
        addresses, held = np.zeros(ids.shape, dtype=np.int64), ids != NO_PAGE
        addresses[held] = self.pool.addresses(ids[held])
        return addresses

    def _explicit_cells(self) -> list[tuple[int, int]]:
        """The cells whose page stores a position per token."""
        if not self.pool.positions:
            return []
        cells = np.argwhere(np.isin(self._ids, self.pool.scattered_pages()))
        return [(int(row), int(column)) for row, column in cells]

    def _reserve(self, columns: int) -> None:
        """Room for ``columns`` columns, growing by half, so that appending costs constant time on average."""
        held = self._ids.shape[1]
        if columns <= held:
            return
        more = max(columns, held * 3 // 2) - held
        self._ids = _wider(self._ids, more, NO_PAGE)
        self._addresses, self._counts = _wider(self._addresses, more), _wider(self._counts, more)
        self._first = _wider(self._first, more)


def _wider(array: np.ndarray, more: int, fill: int = 0) -> np.ndarray:
    """A copy with ``more`` columns of ``fill`` behind the others. ``np.pad`` takes 30 times as long for few columns."""
    wider = np.full((len(array), array.shape[1] + more), fill, dtype=array.dtype)
    wider[:, : array.shape[1]] = array
    return wider


def _at(array: np.ndarray, columns: np.ndarray, none: int = 0) -> np.ndarray:
    """What stands in ``columns [rows, n]`` of each row of ``array``, ``none`` behind its last column."""
    inside = columns < array.shape[1]
    return np.where(inside, np.take_along_axis(array, np.where(inside, columns, 0), 1), array.dtype.type(none))


def ids_at(table: PageTable, columns: np.ndarray) -> np.ndarray:
    """The ids ``[rows, n]`` of the pages in ``columns [rows, n]`` of each row, ``-1`` where a row has no page."""
    return _at(table._ids, columns, NO_PAGE)


def page_spans(table: PageTable, leave_out: int, page_size: int) -> list[tuple[int, int]]:
    """First and last position in the pages of each sequence, over its heads; ``(0, -1)`` without pages.

    The last ``leave_out`` pages of each row do not count.
    """
    columns = table.columns
    positions = table.positions(0, columns, page_size)
    _, counts, _ = table.arrays(columns)
    first, last = [], []
    for row, length in enumerate((table.lengths - leave_out).tolist()):
        first.append(int(positions[row, 0, 0]) if length > 0 else NOWHERE)
        last.append(int(positions[row, length - 1, counts[row, length - 1] - 1]) if length > 0 else -1)
    spans = zip(*(np.reshape(x, (-1, table.heads)) for x in (first, last)), strict=True)
    return [(int(a.min()), int(b.max())) if b.max() >= 0 else (0, -1) for a, b in spans]
