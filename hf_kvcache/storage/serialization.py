"""The pages of a table as tensors, each page once, and back."""

from __future__ import annotations

import numpy as np
import torch

from hf_kvcache.storage.page_table import PageTable


def export_pages(table: PageTable) -> dict[str, torch.Tensor]:
    """Records, and the table as indices into them.

    Returns:
        ``records`` uint8 ``[pages, record_bytes]``; ``table`` (``-1`` where a row is shorter), ``counts`` and ``first``
        ``[rows, columns]``; ``scattered``, the indices of pages that store a position per token, and their
        ``positions [len(scattered), P]``.
    """
    pool = table.pool
    ids, counts, first = table.export()
    unique, index = np.unique(ids[ids >= 0], return_inverse=True)
    cells = np.full_like(ids, -1)
    cells[ids >= 0] = index
    scattered = [i for i, page in enumerate(unique.tolist()) if page in pool.positions]
    positions = [pool.positions[int(unique[i])] for i in scattered]
    return {
        "records": pool.read(unique),
        "table": torch.from_numpy(cells),
        "counts": torch.from_numpy(counts),
        "first": torch.from_numpy(first),
        "scattered": torch.tensor(scattered, dtype=torch.int64),
        "positions": torch.from_numpy(np.stack(positions) if positions else np.zeros((0, 0), dtype=np.int64)),
    }


def import_pages(table: PageTable, state: dict[str, torch.Tensor]) -> None:
    """Fill an empty table and its pool with what :func:`export_pages` returned."""
    pool, cells = table.pool, state["table"].numpy()
    ids = pool.allocate(len(state["records"]))
    if len(ids):
        pool.write(ids, state["records"].to(pool.device))
        cells = np.where(cells >= 0, ids[cells], -1)
    table.restore(cells, state["counts"].numpy(), state["first"].numpy())
    for index, positions in zip(state["scattered"].tolist(), state["positions"].numpy(), strict=True):
        pool.note_positions(int(ids[index]), positions.copy())
