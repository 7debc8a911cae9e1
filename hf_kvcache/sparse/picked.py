"""The pages that a selector has picked, as kernels read them."""

from __future__ import annotations

import numpy as np
import torch

from hf_kvcache.kernels.device_table import DeviceTable
from hf_kvcache.kernels.inputs import Pages


class PickedPages(Pages):
    """Some columns of a table, others for each row, in the order of their positions.

    Each step writes its choice over the one before, at the same addresses. So a prepared call stays right from step to
    step, and on a GPU nothing is read back.

    Args:
        pages: all pages. They hold full pages in every row if ``full``.
        columns: number of pages to read of each row, at most.
        full: whether every row reads so many pages, and all tokens of these count.
    """

    def __init__(self, pages: Pages, columns: int, full: bool) -> None:
        counts = np.zeros((pages.rows, columns), dtype=np.int32)
        with torch.inference_mode(False):  # a tensor made in that mode could not be changed outside of it
            self.table = torch.zeros(3, pages.rows, columns, dtype=torch.int64, device=pages.device)
            self._counts_there = torch.from_numpy(counts)
        host = self.table
        if host.device.type != "cpu":
            host = torch.zeros(host.shape, dtype=torch.int64, device="cpu")
        addresses, _, first = host.numpy()
        super().__init__(
            pages.layout, pages.slabs, addresses, counts, first, {}, pages.key_mean, pages.heads, pages.key_scale
        )
        self.__dict__["full"] = full

    def pick(self, pages: Pages, columns: torch.Tensor) -> None:
        """Choose columns of the table of ``pages``.

        Args:
            pages: all pages.
            columns: int64 ``[rows, columns]``, ascending; numbers behind those of the pages stand for no page.
        """
        self.slabs = pages.slabs  # pages from outside of the device may have been fetched to another place
        table = pages.on_device().table
        if self.full:
            torch.gather(table, 2, columns.expand(3, -1, -1), out=self.table)
        else:
            held = columns < pages.columns
            self.table.copy_(table.gather(2, columns.clamp(max=pages.columns - 1).expand(3, -1, -1)).mul_(held))
        if self.table.device.type == "cpu":
            self._counts_there.copy_(self.table[1])

    def on_device(self, positions: bool = False) -> DeviceTable:
        """The choice on the device; positions of tokens are not known, and attention without a window needs none."""
        assert not positions, "picked pages are read without a window"
        return DeviceTable(self.table, self.table.shape[2], None)

    def cells(self) -> int:
        """The number of pages that were picked in all rows; on a GPU this waits for the device."""
        return int((self.table[0] != 0).sum())

    def to_host(self) -> None:
        """Bring the choice to the host, where the reference looks for it. On a GPU this waits for the device."""
        if self.table.device.type != "cpu":
            addresses, counts, first = self.table.cpu().numpy()
            self.addresses[:], self.counts[:], self.first[:] = addresses, counts, first
