"""Work that several processes of ``accelerate launch`` or ``torchrun`` share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

#: A process may wait for the others as long as their work takes.
_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """This process among those that share some work.

    What is exchanged goes over the host, by Gloo, whatever else the processes use.

    Attributes:
        rank: number of this process, from 0.
        count: of all processes.
        group: of ``torch.distributed``; None where this process is alone.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, by rank. A value can be pickled."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, value, group=self.group)
        return found

    def add_up(self, sums: Mapping[int, Sequence[torch.Tensor]]) -> None:
        """Replace tensors on the host, by the index of their layer, by their sums over all processes.

        Raises:
            ValueError: in all processes, if some of them have no sums.
        """
        layers = self.gathered(sorted(sums))
        if any(found != layers[0] for found in layers):
            raise ValueError(
                f"texts with fewer chunks than processes: some of the {self.count} have read nothing; accepted: longer "
                "texts, a smaller length, or fewer processes"
            )
        if self.count > 1:
            for index in layers[0]:
                for tensor in sums[index]:
                    distributed.all_reduce(tensor, group=self.group)


#: One process that works alone.
ALONE = Processes()


def joined() -> Processes:
    """The processes of ``torch.distributed``, if it is initialized; else this one alone. All of them call it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return ALONE
    group = distributed.new_group(backend="gloo", timeout=_TIMEOUT)
    return Processes(distributed.get_rank(), distributed.get_world_size(), group)


@contextmanager
def launched() -> Iterator[Processes]:
    """The processes that a launcher has started this one among; this one alone where there was no launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield ALONE
        return
    if distributed.is_initialized():
        yield joined()
        return
    distributed.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def own_device(device: str | None) -> str | None:
    """The device of this process: with several of them, each has its own of the GPUs if ``device`` says no number."""
    rank = os.environ.get("LOCAL_RANK")
    if device is None or device == "cpu" or ":" in device or rank is None:
        return device
    return f"{device}:{rank}"
