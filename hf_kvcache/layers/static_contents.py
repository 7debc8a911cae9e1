"""What the tensors of a layer with a fixed maximum length hold, as functions on the CPU read them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from hf_kvcache.kernels.inputs import DenseTokens, Pages
from hf_kvcache.kernels.static_state import FIRST, GAPS, LAST, LENGTH, PAGES
from hf_kvcache.layers.static_tensors import Numbers, StaticSettings, StaticTensors
from hf_kvcache.storage.integrity import IntegrityError


class StaticContents:
    """The tensors of one layer, as functions on the host read them.

    Args:
        tensors: the state.
        settings: for which it was allocated.
    """

    def __init__(self, tensors: StaticTensors, settings: StaticSettings) -> None:
        self.tensors, self.settings = tensors, settings
        self.batch, self.heads, self.slots, _ = tensors.sizes
        self.layout = settings.encoder.layout
        self.page_size = self.layout.page_size
        self.numbers = Numbers(tensors)
        self.lengths, self.pages_held = self.numbers.counters[LENGTH], self.numbers.counters[PAGES]

    @property
    def seen(self) -> int:
        """Tokens seen, padding included."""
        return int(self.numbers.seen[0])

    @property
    def dense(self) -> DenseTokens:
        """All slots of the dense buffer."""
        return DenseTokens(self.tensors.dense_keys, self.tensors.dense_values)

    def pages(self) -> Pages | None:
        """The pages as kernels read them; None if there are none."""
        held, numbers, tensors = self.pages_held, self.numbers, self.tensors
        columns = int(held.max())
        if columns == 0:
            return None
        base, (rows, width) = tensors.records.data_ptr(), numbers.first.shape
        if self.settings.window is None:
            addresses = _addresses(base, rows, width, self.layout.record_bytes)
        else:
            addresses = base + numbers.places * self.layout.record_bytes
        counts = _full_counts(rows, width, self.page_size)
        if held.min() != columns:
            missing = np.arange(width) >= held.repeat(self.heads)[:, None]
            addresses, counts = np.where(missing, 0, addresses), np.where(missing, 0, counts).astype(np.int32)
        mean, scale = (None if t is None else t.flatten(0, 1) for t in (tensors.key_mean, tensors.key_scale))
        addresses, counts, first = (x[:, :columns] for x in (addresses, counts, numbers.first))
        slabs, scattered = [tensors.records], self._scattered()
        return Pages(self.layout, slabs, addresses, counts, first, scattered, mean, self.heads, scale)

    def _scattered(self) -> dict[tuple[int, int], np.ndarray]:
        """Positions of the pages whose tokens do not stand side by side, by row and column."""
        if not self.numbers.counters[GAPS].any():
            return {}
        positions = self.numbers.paged.astype(np.int64)
        apart = positions[:, :, -1] - positions[:, :, 0] != self.page_size - 1
        apart &= np.arange(positions.shape[1]) < self.pages_held[:, None]
        return {
            (int(row) * self.heads + head, int(column)): positions[row, column]
            for row, column in np.argwhere(apart)
            for head in range(self.heads)
        }

    def held_places(self, width: int) -> np.ndarray:
        """Which of the first ``width`` positions are those of tokens that came and were no padding, bool ``[B, W]``.

        Of a layer with a sliding window, positions that have left the window count as well or not.
        """
        held = np.zeros((self.batch, width), dtype=bool)
        for row in range(self.batch):
            first, last, gaps = (int(self.numbers.counters[i, row]) for i in (FIRST, LAST, GAPS))
            if not gaps:
                held[row, max(first, 0) : last + 1] = True
                continue
            held[row, self.numbers.paged[row, : self.pages_held[row]].reshape(-1)] = True
            held[row, self.numbers.positions[row, : self.lengths[row]]] = True
        return held

    def check_room(self, length: int) -> None:
        """Raise ValueError unless there is room for ``length`` more tokens."""
        most, seen = self.settings.max_length, self.seen
        if seen + length > most:
            raise ValueError(
                f"max_length={most!r}: the cache has seen {seen} tokens, and {length} more do not fit; accepted: "
                f"{seen + length} or more. Build the cache with a larger max_length"
            )

    def check(self) -> None:
        """Raise IntegrityError if a counter is out of range, or positions do not ascend."""
        numbers, paged = self.numbers, self.numbers.paged
        seen, rows = self.seen, len(numbers.places)
        if not 0 <= seen <= self.settings.max_length:
            raise IntegrityError(f"{seen} tokens seen of {self.settings.max_length}")
        columns = (numbers.places - np.arange(rows)[:, None]) // max(rows, 1)
        if (np.sort(columns, 1) != np.arange(columns.shape[1])).any():
            raise IntegrityError("two pages have the same place")
        sinks = self.settings.sink_length
        for row in range(self.batch):
            length, pages = int(self.lengths[row]), int(self.pages_held[row])
            if not (0 <= length < self.slots and 0 <= pages <= paged.shape[1]):
                raise IntegrityError(f"sequence {row}: {length} slots and {pages} pages in use")
            dense = numbers.positions[row, :length]
            at = np.concatenate([dense[:sinks], paged[row, :pages].reshape(-1), dense[sinks:]])
            if (np.diff(at) <= 0).any() or (at >= seen).any():
                raise IntegrityError(f"the positions of sequence {row} do not ascend to {seen}")
            first = numbers.first[row * self.heads : (row + 1) * self.heads, :pages]
            if (first != paged[row, :pages, 0]).any():
                raise IntegrityError(f"sequence {row}: a page does not begin where the table says")


@lru_cache(maxsize=512)
def _addresses(base: int, rows: int, width: int, record_bytes: int) -> np.ndarray:
    """Where the pages of rows lie that begin at the address ``base``, int64 ``[rows, width]``, as they are at first."""
    return base + (np.arange(width) * rows + np.arange(rows)[:, None]) * record_bytes


@lru_cache(maxsize=64)
def _full_counts(rows: int, width: int, page_size: int) -> np.ndarray:
    return np.full((rows, width), page_size, dtype=np.int32)
