"""Pages outside of the device on a machine without one: in files, or fetched into buffers as on a GPU."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from hf_kvcache.storage.fetching import Buffer, DeviceBuffers
from hf_kvcache.storage.offload import HostMemory, MappedFiles, OffloadTarget, _powers_of_two
from hf_kvcache.storage.slabs import Slab

_NAN = 255  # of all bytes of a float


class LateBuffers(DeviceBuffers):
    """Buffers that hold NaN from the beginning of a copy until it is waited for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.under_way: dict[int, torch.Tensor] = {}

    def fill(self, buffer: Buffer, *arguments: Any) -> None:
        super().fill(buffer, *arguments)
        self.under_way[id(buffer)] = buffer.memory.clone()
        buffer.memory.fill_(_NAN)

    def wait(self, buffer: Buffer) -> None:
        arrived = self.under_way.pop(id(buffer), None)
        if arrived is not None:
            buffer.memory.copy_(arrived)


class Fetching(HostMemory):
    """The host's memory as if a layer on the CPU could not read it there. Memory is NaN until it is written."""

    def serves(self, device: torch.device) -> bool:
        return True

    def in_place(self, device: torch.device) -> bool:
        return False

    def slabs(self, pages: int, record_bytes: int, device: torch.device) -> list[Slab]:
        slabs = [Slab(torch.empty(n, record_bytes, dtype=torch.uint8)) for n in _powers_of_two(pages, record_bytes)]
        for slab in slabs:
            slab.records.fill_(_NAN)
        return slabs

    def _new_buffers(self, device: torch.device) -> DeviceBuffers:
        return LateBuffers(device)

    def __reduce__(self) -> tuple[Any, ...]:
        return Fetching, ()


def target(kind: str | None, folder: Any = None) -> OffloadTarget | None:
    """None, or what ``"files"`` and ``"fetched"`` stand for."""
    if kind is None:
        return None
    return Fetching() if kind == "fetched" else MappedFiles(folder or tempfile.gettempdir())
