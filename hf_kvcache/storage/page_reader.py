"""The pages of a storage as kernels read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hf_kvcache.kernels.inputs import Pages
from hf_kvcache.kernels.page import PageLayout
from hf_kvcache.storage.fetching import Fetched, PageFetch
from hf_kvcache.storage.key_basis import KeyBasis
from hf_kvcache.storage.page_table import PageTable


class PageReader:
    """Makes :class:`Pages` of a page table, once for each of its versions.

    Args:
        layout: of the records.
        fetch: brings pages from outside of the device to it; None if they lie on it.
    """

    def __init__(self, layout: PageLayout, fetch: PageFetch | None) -> None:
        self.layout, self.fetch = layout, fetch
        # The latest pages, of which version of the table they are, and where they were fetched to.
        self._pages: Pages | None = None
        self._version = -1
        self._fetched: Fetched | None = None
        # The same pages without records, and of which version they are.
        self._outline: Pages | None = None
        self._outline_version = -1

    @property
    def nbytes(self) -> int:
        """Bytes of bookkeeping."""
        return 0 if self.fetch is None else self.fetch.nbytes

    def fork(self) -> PageReader:
        """The same for a fork of the storage."""
        return PageReader(self.layout, None if self.fetch is None else self.fetch.fork())

    def unfetched(self, table: PageTable, basis: KeyBasis) -> Pages | None:
        """The pages of ``table`` as :meth:`read` gives them, but where they would have to be fetched without records.

        Kernels cannot read these: they say how many pages there are, and how many tokens each has.
        """
        if self.fetch is None or self.fetch.in_place:
            return self.read(table, basis)
        if self._outline_version != table.version:
            nothing = torch.empty(0, self.layout.record_bytes, dtype=torch.uint8, device=self.fetch.device)
            addresses = np.zeros_like(table.arrays(table.columns)[0])
            self._outline = _pages(self.layout, table, basis, [nothing], addresses)
            self._outline_version = table.version
        return self._outline

    def read(self, table: PageTable, basis: KeyBasis) -> Pages | None:
        """The pages of ``table``; None if there are none.

        As long as nothing changes, it is the same object. Pages outside of the device are fetched. They are there for
        what is queued before another layer's are.

        Args:
            table: which pages these are.
            basis: mean and scale of the keys.
        """
        fetched = None if self.fetch is None else self.fetch.bring(table)
        if self._version != table.version or self._fetched is not fetched:
            self._pages = self._made(table, basis, fetched)
            self._version, self._fetched = table.version, fetched
        return self._pages

    def __reduce__(self) -> tuple[Any, ...]:
        # What was read lies at addresses of this process.
        return PageReader, (self.layout, None if self.fetch is None else self.fetch.fork())

    def _made(self, table: PageTable, basis: KeyBasis, fetched: Fetched | None) -> Pages | None:
        if fetched is None:
            pages = _pages(self.layout, table, basis, table.pool.slabs(), table.arrays(table.columns)[0])
        else:
            pages = _pages(self.layout, table, basis, [fetched.records], fetched.addresses)
        if pages is not None:
            pages.follow(table.resident)
        return pages


def _pages(
    layout: PageLayout, table: PageTable, basis: KeyBasis, slabs: list[torch.Tensor], addresses: np.ndarray
) -> Pages | None:
    """The pages of ``table``, whose records lie at ``addresses [rows, columns]`` in ``slabs``; None without pages."""
    if table.columns == 0:
        return None
    _, counts, first = table.arrays(table.columns)
    mean, scale = basis.by_row()
    return Pages(layout, slabs, addresses, counts, first, table.scattered(), mean, table.heads, scale)
