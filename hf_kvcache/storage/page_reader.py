"""The pages of a storage as kernels read them."""

from __future__ import annotations

from typing import Any

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

    @property
    def nbytes(self) -> int:
        """Bytes of bookkeeping."""
        return 0 if self.fetch is None else self.fetch.nbytes

    def fork(self) -> PageReader:
        """The same for a fork of the storage."""
        return PageReader(self.layout, None if self.fetch is None else self.fetch.fork())

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
        if table.columns == 0:
            return None
        addresses, counts, first = table.arrays(table.columns)
        slabs = table.pool.slabs()
        if fetched is not None:
            slabs, addresses = [fetched.records], fetched.addresses
        mean, scale = basis.by_row()
        pages = Pages(self.layout, slabs, addresses, counts, first, table.scattered(), mean, table.heads, scale)
        pages.follow(table.resident)
        return pages
