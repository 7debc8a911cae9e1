"""A storage as tensors by name, each page once, and back."""

from __future__ import annotations

import numpy as np
import torch

from hf_kvcache.storage.dense_buffer import DenseBuffer
from hf_kvcache.storage.page_table import PageTable
from hf_kvcache.storage.page_writer import PageWriter


def export_storage(table: PageTable, dense: DenseBuffer, writer: PageWriter) -> dict[str, torch.Tensor]:
    """The contents of a storage: what :func:`export_pages` says, the dense tokens, and what the writer knows.

    Returns:
        ``dense.keys``, ``dense.values``, ``dense.positions`` and ``dense.lengths`` of the slots in use; ``ahead``, the
        number of pages packed ahead; ``center`` and ``center_known``, the key mean of each sequence and whether it is
        fixed, with codecs that subtract one; ``key_scale`` with codecs that scale keys.
    """
    held = dense.longest
    return export_pages(table) | {
        "ahead": torch.tensor(writer.ahead, device="cpu"),
        "dense.keys": dense.keys[:, :, :held].clone(),
        "dense.values": dense.values[:, :, :held].clone(),
        "dense.positions": torch.from_numpy(dense.positions[:, :held].copy()),
        "dense.lengths": torch.from_numpy(dense.lengths.copy()),
        **writer.basis.state(),
    }


def import_storage(
    table: PageTable, dense: DenseBuffer, writer: PageWriter, state: dict[str, torch.Tensor], owned: bool = False
) -> None:
    """Fill the parts of an empty storage with what :func:`export_storage` returned.

    Args:
        table: receives the pages.
        dense: receives the full-precision tokens.
        writer: receives what it knows.
        state: the tensors.
        owned: whether nobody else has the tensors. They are then kept as they are, and written to, where they lie on
            the device of the storage.
    """
    import_pages(table, state, owned)
    writer.ahead = int(state["ahead"])
    keys, values = (state[name].to(dense.keys.device) for name in ("dense.keys", "dense.values"))
    if owned:
        dense.adopt(keys, values, state["dense.positions"].numpy())
    else:
        dense.store(slice(None), keys, values, state["dense.positions"].numpy())
    dense.set_lengths(state["dense.lengths"].numpy())
    writer.basis.restore(state)


def export_pages(table: PageTable) -> dict[str, torch.Tensor]:
    """Records, and the table as indices into them.

    Returns:
        ``records`` uint8 ``[pages, record_bytes]``, on the host if pages lie outside of the device; ``table`` (``-1``
        where a row is shorter), ``counts`` and ``first`` ``[rows, columns]``; ``scattered``, the indices of pages that
        store a position per token, and their ``positions [len(scattered), P]``.
    """
    pool = table.pool
    ids, counts, first = table.export()
    unique, index = np.unique(ids[ids >= 0], return_inverse=True)
    cells = np.full_like(ids, -1)
    cells[ids >= 0] = index
    scattered = [i for i, page in enumerate(unique.tolist()) if page in pool.positions]
    positions = [pool.positions[int(unique[i])] for i in scattered]
    return {
        "records": pool.memory.read_outside(unique),
        "table": torch.from_numpy(cells),
        "counts": torch.from_numpy(counts),
        "first": torch.from_numpy(first),
        "scattered": torch.tensor(scattered, dtype=torch.int64, device="cpu"),
        "positions": torch.from_numpy(np.stack(positions) if positions else np.zeros((0, 0), dtype=np.int64)),
    }


def import_pages(table: PageTable, state: dict[str, torch.Tensor], owned: bool = False) -> None:
    """Fill an empty table with what :func:`export_pages` returned; ``owned`` as in :func:`import_storage`."""
    pool, cells = table.pool, state["table"].numpy()
    records = state["records"].to(pool.device)
    ids = pool.adopt(records) if owned else pool.allocate(len(records))
    if len(ids):
        if not owned:
            pool.write(ids, records)
        cells = np.where(cells >= 0, ids[cells], -1)
    for index, positions in zip(state["scattered"].tolist(), state["positions"].numpy(), strict=True):
        pool.note_positions(int(ids[index]), positions.copy())
    table.restore(cells, state["counts"].numpy(), state["first"].numpy())
