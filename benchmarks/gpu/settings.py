"""What a run of the check is told: where it runs, how much of it, and for how long."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

BACKEND = "HF_KVCACHE_BACKEND"


@dataclass(frozen=True)
class Settings:
    """The settings of one process of the check.

    Attributes:
        device: ``"cuda"``, or ``"cpu"`` for a dry run.
        tiny: whether all sizes are tiny: does every line run?
        out: folder of the results.
        seconds: how long this process may take.
        only: cases and checks whose name contains this; all with "".
        started: when this process started.
    """

    device: torch.device
    tiny: bool = False
    out: Path = Path("results/gpu")
    seconds: float = 1e9
    only: str = ""
    started: float = field(default_factory=time.perf_counter)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def interpreted(self) -> bool:
        """Whether a dry run takes the Triton kernels, in the interpreter."""
        return not self.cuda and os.environ.get("TRITON_INTERPRET") == "1"

    @property
    def kernels(self) -> bool:
        """Whether the Triton kernels are what is looked at: a call that is left to the reference is then a failure."""
        return self.cuda or self.interpreted

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values where speed is measured."""
        return torch.bfloat16 if self.cuda else torch.float32

    def left(self) -> float:
        """Seconds that this process may still take."""
        return self.seconds - (time.perf_counter() - self.started)

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.cuda:
            torch.cuda.synchronize()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend of the package's kernels; with "", none."""
    before = os.environ.get(BACKEND)
    os.environ[BACKEND] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[BACKEND]
        else:
            os.environ[BACKEND] = before


@contextmanager
def poisoned(settings: Settings) -> Iterator[None]:
    """On a GPU, new tensors are full of NaN, so that what a kernel does not write is seen."""
    if not settings.cuda:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling: Any = torch.utils.deterministic
    before_filling, filling.fill_uninitialized_memory = filling.fill_uninitialized_memory, True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        filling.fill_uninitialized_memory = before_filling


def be_quiet() -> None:
    """No warnings of other libraries; the package's stay."""
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
