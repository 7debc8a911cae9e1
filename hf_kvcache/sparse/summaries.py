"""What is kept of each page to score it by: one or two vectors in 8 bits, in the order of the page table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hf_kvcache.sparse.base import Selector
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.page_table import ColumnFollower
from hf_kvcache.storage.transfers import to_device
from hf_kvcache.utils.autocast import without_autocast

#: Columns of a table, at least.
_LEAST_COLUMNS = 16
#: Elements of keys that are decoded at a time.
_DECODED_ELEMENTS = 1 << 21
_LARGEST_CODE = 127
#: Magnitudes for which the scale is a normal number in half precision.
_LEAST, _MOST = 2.0**-7, 2.0**22


class PageSummaries(ColumnFollower):
    """Summaries of the pages of one layer. They follow the page table: only columns that have changed are made anew.

    Keys are summarized as they are decoded, in the model's basis, since that is what attention sees. A vector is kept
    as signed bytes with one scale for all vectors of a part of a page. Bounds are rounded outward and stay bounds.

    Args:
        selector: says what to keep.
        storage: the pages.
    """

    def __init__(self, selector: Selector, storage: PagedStorage) -> None:
        self.selector = selector
        self.spans = selector.parts if selector.span is None else storage.page_size // selector.span
        self._codes: torch.Tensor | None = None  # int8 [rows, capacity * spans, selector.width(D)]
        self._scales: torch.Tensor | None = None  # float16 [rows, capacity * spans]
        self.table = storage.table
        self.table.followers.add(self)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors that are held."""
        return [x for x in (self._codes, self._scales) if x is not None]

    @property
    def bytes_per_page(self) -> int:
        """Bytes of a page's summaries, which a step reads."""
        if self._codes is None or self._scales is None:
            return 0
        return self.spans * (self._codes.shape[2] + self._scales.element_size())

    def brought(self, storage: PagedStorage, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The summaries of the first ``columns`` columns of the table, made anew where it has changed.

        Returns:
            Signed bytes ``[rows, columns * spans, selector.width(D)]``, and their scales ``[rows, columns * spans]``.
        """
        held = storage.table.columns
        if self._codes is None or self.same < held:
            self._bring(storage, held)
        assert self._codes is not None and self._scales is not None
        stop = columns * self.spans
        return self._codes[:, :stop], self._scales[:, :stop]

    def select(self, rows: np.ndarray) -> None:
        if self._codes is None or self._scales is None:
            return
        index = to_device(rows, self._codes.device)
        with torch.inference_mode(False):
            self._codes, self._scales = self._codes[index], self._scales[index]

    def fork(self, storage: PagedStorage) -> PageSummaries:
        """A copy for a fork of the storage."""
        other = object.__new__(PageSummaries)
        other.__dict__.update(self.__dict__)
        with torch.inference_mode(False):
            if self._codes is not None and self._scales is not None:
                other._codes, other._scales = self._codes.clone(), self._scales.clone()
        other.table = storage.table
        other.table.followers.add(other)
        return other

    # -- internals ------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def reserve(self, storage: PagedStorage, columns: int) -> None:
        """Make room for so many columns, growing by half, so that a page costs constant time on average."""
        rows, width = len(storage.table.lengths), self.selector.width(storage.layout.sides["keys"].dim)
        held, codes, scales, device = 0, self._codes, self._scales, storage.device
        if codes is not None and codes.shape[0] == rows and codes.device == device:
            held = codes.shape[1] // self.spans
        else:
            self.same = 0
        if held >= columns:
            return
        room = max(columns, held * 3 // 2, _LEAST_COLUMNS) * self.spans
        self._codes = torch.zeros(rows, room, width, dtype=torch.int8, device=device)
        self._scales = torch.zeros(rows, room, dtype=torch.float16, device=device)
        kept = self.same * self.spans
        if kept and codes is not None and scales is not None:
            self._codes[:, :kept], self._scales[:, :kept] = codes[:, :kept], scales[:, :kept]

    def _bring(self, storage: PagedStorage, stop: int) -> None:
        rows, dim = len(storage.table.lengths), storage.layout.sides["keys"].dim
        self.reserve(storage, stop)
        step = max(1, _DECODED_ELEMENTS // (rows * storage.page_size * dim))
        with without_autocast(storage.device):
            for start in range(self.same, stop, step):
                self._summarize(storage, start, min(start + step, stop))
        self.same = stop

    def _summarize(self, storage: PagedStorage, start: int, stop: int) -> None:
        """Make the summaries of the columns ``[start, stop)``."""
        keys, unused = _keys_of(storage, start, stop)
        rows, columns, size, dim = keys.shape
        parts = keys.reshape(-1, size // self.spans, dim)
        hidden = None if unused is None else unused.reshape(-1, size // self.spans)
        vectors = self.selector.summarize(parts, hidden)
        if hidden is not None and self.spans > 1:
            # A part without tokens says what the first part of its page says, since zeros would be a guess.
            first = vectors.unflatten(0, (-1, self.spans))[:, :1].expand(-1, self.spans, -1, -1).flatten(0, 1)
            vectors = torch.where(hidden.all(1)[:, None, None], first, vectors)
        codes, scales = rounded(banded(vectors, self.selector.band_of(dim)), self.selector.rounding)
        assert self._codes is not None and self._scales is not None
        place = slice(start * self.spans, stop * self.spans)
        self._codes[:, place] = codes.view(rows, columns * self.spans, -1)
        self._scales[:, place] = scales.view(rows, columns * self.spans)


def banded(vectors: torch.Tensor, band: int) -> tuple[torch.Tensor, ...]:
    """The vectors ``[N, vectors, D]`` one by one.

    Where ``band`` is above 1 the second one has deviations, of which there is the root of the sum of the squares in
    each band, ``[N, D / band]``.
    """
    first, *rest = vectors.unbind(1)
    return (first, *rest) if band == 1 else (first, *(x.unflatten(1, (-1, band)).square().sum(2).sqrt() for x in rest))


def rounded(vectors: Sequence[torch.Tensor], rounding: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors in 8 bits with one scale for those of a part of a page.

    Args:
        vectors: float32 ``[N, W]`` each.
        rounding: for each vector 1 to round up, -1 down, 0 to the nearest.

    Returns:
        int8 ``[N, sum of W]`` and float16 ``[N]``. Bounds stay bounds up to 4 million.
    """
    largest = torch.stack([x.abs().amax(1) for x in vectors]).amax(0).clamp(_LEAST, _MOST)
    # A scale that half precision rounds down would put the largest element beyond the last code.
    scales = (largest / (_LARGEST_CODE - 0.5)).to(torch.float16)
    by, ways = scales.float()[:, None], {1: torch.ceil, -1: torch.floor, 0: torch.round}
    codes = torch.cat([ways[way](x / by) for x, way in zip(vectors, rounding, strict=True)], 1)
    return codes.clamp_(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8), scales


def _keys_of(storage: PagedStorage, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The keys in the columns ``[start, stop)``, ``[rows, columns, P, D]``, and where there is none, or None."""
    table, size = storage.table, storage.page_size
    every = np.arange(len(table.lengths))
    ids, counts = table.ids(every, stop)[:, start:].T, table.counts(every, stop)[:, start:]
    records = storage.pool.read(np.where(ids >= 0, ids, ids.max()).flatten()).unflatten(0, ids.shape)
    buffer = torch.empty(*ids.shape, size, storage.layout.sides["keys"].dim, dtype=torch.float32, device=storage.device)
    mean, scale = storage.writer.basis.by_row()
    keys = storage.encoder.decode("keys", records, mean, buffer, scale).unflatten(1, (stop - start, size))
    if (counts == size).all():
        return keys, None
    return keys, to_device(np.arange(size) >= counts[:, :, None], storage.device)
