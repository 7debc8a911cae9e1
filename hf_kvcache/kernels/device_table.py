"""The table of pages on the device of the pages: it stays there from step to step, and changes are sent to it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch

#: Bytes up to which CUDA copies pageable memory before a call returns.
_COPIED_AT_ONCE = 1 << 16
#: Columns of a table, at least.
_LEAST_COLUMNS = 16


class HostTable(Protocol):
    """A table on the host; :class:`~hf_kvcache.kernels.inputs.Pages` describes it."""

    addresses: np.ndarray
    counts: np.ndarray
    first: np.ndarray

    @property
    def rows(self) -> int: ...

    @property
    def columns(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def host_positions(self, start: int, stop: int) -> np.ndarray: ...


class DeviceTable(NamedTuple):
    """The table of pages as kernels read it. Columns behind those of the pages hold anything.

    Attributes:
        table: int64 ``[3, rows, capacity]``: addresses of the records (0 where a row has no page), token counts, and
            original positions of the first tokens.
        capacity: columns of the table, the distance between its rows.
        positions: int32 ``[rows, capacity, P]``, original positions of the tokens; None unless they were asked for.
    """

    table: torch.Tensor
    capacity: int
    positions: torch.Tensor | None


class ResidentTable:
    """A table on the device that follows a table on the host.

    The host notes what it changes, and :meth:`brought` sends it to the device when a kernel asks: after a page event
    the new columns, after any other change all of them, and nothing if nothing has changed.

    Attributes:
        version: the version of the table on the host.
    """

    def __init__(self, version: int = -1) -> None:
        self.version = version
        self._table: torch.Tensor | None = None
        self._positions: torch.Tensor | None = None
        # Columns that are the same on the device, of the table and of the positions.
        self._same = self._same_positions = 0

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return sum(x.numel() * x.element_size() for x in (self._table, self._positions) if x is not None)

    def note(self, version: int, column: int) -> None:
        """Note that the host has a new version, in which columns from ``column`` on may have changed."""
        self.version = version
        self._same, self._same_positions = min(self._same, column), min(self._same_positions, column)

    def reserve(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """The tensor of the table, with room for that many columns. It stays where it is while there is room."""
        table = self._table
        if table is not None and table.shape[1] == rows and table.shape[2] >= columns and table.device == device:
            return table
        held = 0 if table is None or table.shape[1] != rows else table.shape[2]
        self._same = self._same_positions = 0
        self._positions = None
        with torch.inference_mode(False):  # a tensor made in that mode could not be changed outside of it
            shape = 3, rows, max(columns, held * 3 // 2, _LEAST_COLUMNS)
            self._table = torch.zeros(shape, dtype=torch.int64, device=device)
        return self._table

    def brought(self, pages: HostTable, positions: bool) -> DeviceTable:
        """The table on the device as ``pages`` say it, with the positions of all tokens if ``positions``."""
        table = self.reserve(pages.rows, pages.columns, pages.device)
        start, stop = self._same, pages.columns
        if start < stop:
            arrays = pages.addresses, pages.counts, pages.first
            send(np.stack([array[:, start:stop] for array in arrays]), table[:, :, start:stop])
            self._same = stop
        return DeviceTable(table, table.shape[2], self._bring_positions(pages, table) if positions else None)

    def _bring_positions(self, pages: HostTable, table: torch.Tensor) -> torch.Tensor:
        start, stop = self._same_positions, pages.columns
        if start >= stop and self._positions is not None:
            return self._positions
        positions = pages.host_positions(start, stop).astype(np.int32)
        if self._positions is None:
            with torch.inference_mode(False):
                shape = *table.shape[1:], positions.shape[2]
                self._positions = torch.zeros(shape, dtype=torch.int32, device=table.device)
        send(positions, self._positions[:, start:stop])
        self._same_positions = stop
        return self._positions


def send(array: np.ndarray, to: torch.Tensor) -> None:
    """Copy an array of the host into a tensor, on a GPU without waiting for it."""
    source = torch.from_numpy(array)
    if to.is_cuda:
        source = source.pin_memory()  # from other memory a copy would wait for the device
    to.copy_(source, non_blocking=True)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """``array`` as a tensor on ``device``, without waiting for the device. On a CPU it shares the array's memory."""
    source = torch.from_numpy(np.ascontiguousarray(array))
    # The driver takes a copy of little memory before the call returns. For more it may wait, unless it is pinned.
    if device.type == "cuda" and array.nbytes > _COPIED_AT_ONCE:
        source = source.pin_memory()
    return source.to(device, non_blocking=True)
