"""Sequences of several storages as one batch, and a sequence of a batch by itself. Pages are shared where they can be.

What is said of positions here: a sequence by itself has no padding, so its tokens stand at 0, 1, 2, and so on. In a
batch they stand behind padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hf_kvcache.storage.page_table import PageTable
from hf_kvcache.storage.paged import PagedStorage
from hf_kvcache.storage.pool import PagePool
from hf_kvcache.storage.serialization import export_pages, import_pages


@torch.inference_mode(False)
def in_pool(storage: PagedStorage, pool: PagePool) -> PagedStorage:
    """A fork of a storage whose pages lie in ``pool``: they are copied unless they lie there already."""
    other = storage.fork()
    if storage.pool is not pool:
        other.pool = pool
        other.table = other.writer.table = PageTable(pool, storage.batch, storage.table.heads)
        import_pages(other.table, export_pages(storage.table), owned=True)
    return other


def compact(storage: PagedStorage) -> PagedStorage:
    """A fork of a storage in a pool of its own that has no other pages."""
    return in_pool(storage, PagePool(storage.layout.record_bytes, storage.device, storage.pool.target))


@torch.inference_mode(False)
def join(storages: Sequence[PagedStorage], shifts: Sequence[int]) -> PagedStorage:
    """The sequences of storages of one sequence each as one batch.

    Args:
        storages: have one sequence each without padding, and no pages packed ahead.
        shifts: for each of them, the position of its first token in the batch.
    """
    pool = storages[0].pool
    parts = [in_pool(storage, pool) for storage in storages]
    other = parts[0].fork()
    other.batch = len(parts)
    other.table = other.writer.table = _joined_table([part.table for part in parts], shifts)
    dense, lengths = other.dense, np.array([int(part.dense.lengths[0]) for part in parts])
    slots = max(max(part.dense.capacity for part in parts), 1)
    dense.keys, dense.values = (
        x.new_zeros(len(parts), x.shape[1], slots, x.shape[3]) for x in (dense.keys, dense.values)
    )
    dense.positions = np.zeros((len(parts), slots), dtype=np.int64)
    dense.lengths = np.zeros(len(parts), dtype=np.int64)
    for row, (part, shift) in enumerate(zip(parts, shifts, strict=True)):
        held = slice(0, int(lengths[row]))
        of_row = part.dense
        dense.keys[row, :, held], dense.values[row, :, held] = of_row.keys[0, :, held], of_row.values[0, :, held]
        dense.positions[row, held] = of_row.positions[0, held] + shift
    dense.set_lengths(lengths)
    other.writer.basis.join([part.writer.basis for part in parts])
    return other


@torch.inference_mode(False)
def take_out(storage: PagedStorage, row: int, padding: np.ndarray) -> PagedStorage:
    """One sequence of a batch by itself.

    Args:
        storage: of the batch, without pages packed ahead.
        row: number of the sequence.
        padding: positions of its padding, ascending.
    """
    other = storage.fork()
    other.select(np.array([row]))
    table, pool = other.table, other.pool
    ids, counts, first = table.export()
    held = ids >= 0
    moved = [page for page in np.unique(ids[held]).tolist() if page in pool.positions]
    if moved:
        # Their positions are stored with the page, which the batch still has: they are copied.
        copies = pool.allocate(len(moved))
        pool.write(copies, pool.read(np.array(moved)))
        renamed = dict(zip(moved, copies.tolist(), strict=True))
        new = np.vectorize(lambda page: renamed.get(page, page), otypes=[np.int64])(ids)
        first = np.where(held, first - np.searchsorted(padding, first), 0)
        table.replace(np.arange(len(ids)), new, counts, first)
        # The references of pages that stay are the table's already; `replace` has given back those that go.
    elif len(padding):
        table.replace(np.arange(len(ids)), ids, counts, np.where(held, first - np.searchsorted(padding, first), 0))
    positions = other.dense.positions
    other.dense.positions = positions - np.searchsorted(padding, positions)
    return other


def _joined_table(tables: Sequence[PageTable], shifts: Sequence[int]) -> PageTable:
    columns = max(table.columns for table in tables)
    heads, pool = tables[0].heads, tables[0].pool
    joined = PageTable(pool, len(tables), heads)
    ids = np.full((len(tables) * heads, columns), -1, dtype=np.int64)
    counts, first = np.zeros(ids.shape, dtype=np.int32), np.zeros(ids.shape, dtype=np.int64)
    for number, (table, shift) in enumerate(zip(tables, shifts, strict=True)):
        rows, held = slice(number * heads, (number + 1) * heads), slice(0, table.columns)
        ids[rows, held], counts[rows, held], first[rows, held] = table.export()
        first[rows, held] += shift * (ids[rows, held] >= 0)
    pool.retain(ids[ids >= 0])  # which then pass to the joined table
    joined.replace(np.arange(len(ids)), ids, counts, first)
    return joined
