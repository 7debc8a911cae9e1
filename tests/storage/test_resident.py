"""Copies of picked pages on a device hold what the pages hold, whatever becomes of the table between two steps."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from hf_kvcache.storage.page_table import PageTable, ids_at
from hf_kvcache.storage.pool import PagePool
from hf_kvcache.storage.resident import ResidentPages
from tests.storage.outside import Fetching

BYTES, ROWS, PAGE = 16, 4, 8
CPU = torch.device("cpu")


def _append(table: PageTable, random: np.random.Generator, columns: int) -> None:
    ids = table.pool.allocate(ROWS * columns).reshape(ROWS, columns)
    table.pool.write(ids.flatten(), torch.from_numpy(random.integers(1, 255, (ROWS * columns, BYTES), dtype=np.uint8)))
    first = (table.columns + np.arange(columns)) * PAGE
    table.append(np.arange(ROWS), ids, table.pool.addresses(ids), first, PAGE)


@pytest.mark.parametrize("seed", range(3))
def test_random_operations(seed: int) -> None:
    """Ids are given out again after a crop, rows share pages, forks add to the pool, steps need more or fewer pages."""
    random = np.random.default_rng(seed)
    table = PageTable(PagePool(BYTES, CPU, Fetching()), 2, 2)
    _append(table, random, 6)
    resident, forks, copied = ResidentPages(CPU, BYTES), list[PageTable](), 0
    for _ in range(80):
        match random.integers(8):
            case 0 | 1 | 2:
                table.truncate_from(max(2, table.columns - 2) * PAGE)
                _append(table, random, 2)
            case 3:
                _append(table, random, 1)
            case 4:
                table.truncate_from((table.columns - 1) * PAGE)
            case 5:
                table.select(random.integers(0, 2, 2))
            case 6:
                forks = [table.fork()]
                _append(forks[0], random, 1)
            case 7:
                forks.clear()
        columns = np.sort(random.permuted(np.tile(np.arange(table.columns + 1), (ROWS, 1)), axis=1)[:, :3], 1)
        ids = ids_at(table, columns)
        addresses = resident.bring(table, columns)
        assert ((addresses == 0) == (columns == table.columns)).all()
        held = ids >= 0
        found = b"".join(ctypes.string_at(at, BYTES) for at in addresses[held].tolist())
        assert found == table.pool.read(ids[held]).numpy().tobytes()
        assert resident.copied - copied <= len(np.unique(ids[held])) * BYTES
        copied = resident.copied
        addresses = resident.bring(table, columns)
        assert resident.copied == copied and (addresses[held] > 0).all()
    assert len(resident.records) <= 1.25 * ROWS * 3
