"""What a storage takes up, in bytes of what is actually allocated."""

from __future__ import annotations

import numpy as np

from hf_kvcache.storage.paged import PagedStorage


def bytes_by_part(storage: PagedStorage) -> dict[str, int]:
    """Bytes held, by part; pages shared with a fork count in both.

    Returns:
        ``codes`` and ``scales`` of the pages; ``sinks`` and ``tail``, full-precision tokens; ``tables``, the
        bookkeeping on the host, its copies on the device, and mean and scale of the keys; ``slack``: free pages,
        alignment of pages, and slots not in use.
    """
    layout, dense = storage.layout, storage.dense
    pages = _distinct_pages(storage)
    slot = storage.heads * (dense.keys.shape[3] + dense.values.shape[3]) * storage.dtype.itemsize
    sinks = int(np.minimum(dense.lengths, dense.sink_length).sum())
    tail = int(dense.lengths.sum()) - sinks
    alignment = layout.record_bytes - layout.code_bytes - layout.scale_bytes
    unused = (storage.batch * dense.capacity - sinks - tail) * slot
    return {
        "codes": pages * layout.code_bytes,
        "scales": pages * layout.scale_bytes,
        "sinks": sinks * slot,
        "tail": tail * slot,
        "tables": storage.table.nbytes + storage.reader.nbytes + dense.bookkeeping_bytes + storage.writer.basis.nbytes,
        "slack": pages * alignment + storage.pool.free_pages * layout.record_bytes + unused,
    }


def bytes_outside(storage: PagedStorage) -> int:
    """Bytes of the pages, free ones included, that lie outside of the device."""
    pool = storage.pool
    return 0 if pool.target is None else (_distinct_pages(storage) + pool.free_pages) * pool.record_bytes


def packed_elements(storage: PagedStorage) -> int:
    """Elements of the model's keys and values that pages stand for, each page once."""
    elements = storage.page_size * storage.encoder.group * sum(storage.encoder.widths.values())
    return _distinct_pages(storage) * elements


def _distinct_pages(storage: PagedStorage) -> int:
    ids = storage.table.page_ids()
    held = np.zeros(int(ids.max(initial=-1)) + 1, bool)  # counting is faster than sorting: there may be a million
    held[ids] = True
    return int(held.sum())
