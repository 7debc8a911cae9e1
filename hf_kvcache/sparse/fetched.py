"""The pages that a selector has picked among pages outside of the device."""

from __future__ import annotations

import numpy as np
import torch

from hf_kvcache.kernels.choose import NO_COLUMN
from hf_kvcache.kernels.device_table import send
from hf_kvcache.kernels.inputs import Pages
from hf_kvcache.sparse.picked import PickedPages
from hf_kvcache.storage.page_table import PageTable
from hf_kvcache.storage.resident import ResidentPages
from hf_kvcache.storage.transfers import to_host


class FetchedPages(PickedPages):
    """Picked pages of which the device has a copy. The host fetches those that it has not, so it waits for the choice.

    Args:
        pages: all pages; only how many there are and how many tokens they have.
        columns: as in :class:`PickedPages`.
        full: as there.
        table: which pages these are.
        resident: the copies of pages on the device.
    """

    def __init__(self, pages: Pages, columns: int, full: bool, table: PageTable, resident: ResidentPages) -> None:
        super().__init__(pages, columns, full)
        self._of, self._copies = table, resident

    def pick(self, pages: Pages, columns: torch.Tensor) -> None:
        chosen = to_host(columns)
        held = chosen < pages.columns
        at = np.where(held, chosen, 0)
        counts, first = (np.where(held, np.take_along_axis(x, at, 1), 0) for x in (pages.counts, pages.first))
        addresses = self._copies.bring(self._of, np.where(held, chosen, NO_COLUMN))
        self.slabs = [self._copies.records]
        # On a CPU two of these arrays are the table's own memory.
        self.addresses[:], self.counts[:], self.first[:] = addresses, counts, first
        send(np.stack([addresses, counts, first]), self.table)

    def to_host(self) -> None:
        """The host knows the choice already."""
