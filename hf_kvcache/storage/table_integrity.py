"""What has to hold of a page table."""

from __future__ import annotations

import numpy as np

from hf_kvcache.storage.integrity import IntegrityError
from hf_kvcache.storage.page_table import NO_PAGE, PageTable


def check_table(table: PageTable, page_size: int) -> None:
    """Raise IntegrityError unless counts are sane and positions ascend along every row."""
    filled = np.arange(table._ids.shape[1])[None] < table.lengths[:, None]
    if not np.array_equal(table._ids != NO_PAGE, filled):
        raise IntegrityError("a row has a hole or pages behind its length")
    if not np.array_equal(table._addresses, table._addresses_of(table._ids)):
        raise IntegrityError("a page does not lie where the table says")
    if ((table._counts < 1) & filled).any() or (table._counts > page_size).any() or table._counts[~filled].any():
        raise IntegrityError("a page counts fewer than one token or more than fit")
    positions = table.positions(0, table._ids.shape[1], page_size)
    for row in range(len(table.lengths)):
        counted = np.arange(page_size)[None] < table._counts[row][:, None]
        if (np.diff(positions[row][counted]) <= 0).any():
            raise IntegrityError(f"the positions of row {row} do not ascend")
