"""Chunks of page columns: the unit in which pages are decoded and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from hf_kvcache.storage.pool import PageReader
from hf_kvcache.storage.table import PageTable

#: Tokens of each row that are decoded at a time.
CHUNK_TOKENS = 2048


@dataclass
class PageChunk:
    """``columns`` pages of every row, column by column.

    Attributes:
        reader: reads the records, ``[columns * rows, record_bytes]``.
        columns: pages of each row.
        unused: bool ``[columns, rows, P]`` on the device, True where there is no token; None if all places are used.
        first_position: the smallest position in the chunk.
    """

    reader: PageReader
    columns: int
    unused: torch.Tensor | None
    first_position: int
    _positions: Callable[[], np.ndarray] = field(repr=False)

    def positions(self, device: torch.device) -> torch.Tensor:
        """Original positions ``[columns, rows, P]``, int64; made when asked for, so that they are not kept."""
        return torch.from_numpy(self._positions()).to(device)

    @property
    def nbytes(self) -> int:
        """Bytes that the chunk holds beside the pages."""
        return self.reader.nbytes + (0 if self.unused is None else self.unused.numel())


def build_chunks(table: PageTable, page_size: int, columns: int, device: torch.device) -> list[PageChunk]:
    """Chunks over the first ``columns`` columns of ``table``."""
    step = max(1, CHUNK_TOKENS // page_size)
    return [
        _build_chunk(table, page_size, start, min(start + step, columns), device) for start in range(0, columns, step)
    ]


def _build_chunk(table: PageTable, page_size: int, start: int, stop: int, device: torch.device) -> PageChunk:
    ids, counts, first = table.window(start, stop)
    unused = None
    if (counts < page_size).any():
        unused = torch.from_numpy(np.arange(page_size) >= counts.T[:, :, None]).to(device)

    def positions() -> np.ndarray:
        return np.ascontiguousarray(table.positions(start, stop, page_size).transpose(1, 0, 2))

    reader = table.pool.reader(np.ascontiguousarray(ids.T).flatten())
    return PageChunk(reader, stop - start, unused, int(first[counts > 0].min()), positions)
