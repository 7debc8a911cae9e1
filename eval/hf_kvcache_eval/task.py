"""What every measurement is: a task that runs one method and returns its numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.cells import Memory, Metric, Series
from hf_kvcache_eval.prefills import Prefills
from hf_kvcache_eval.protocol import Protocol, Reader


@dataclass
class Outcome:
    """What a task found out about a method.

    Attributes:
        metrics: the headline metric first.
        series: curves by name.
        memory: bytes after the prefill, if the task looked.
        protocol: the task's own settings, beside the shared ones.
        timing: seconds and what else differs from run to run; it is kept apart from the cell.
    """

    metrics: dict[str, Metric]
    series: dict[str, Series] = field(default_factory=dict)
    memory: Memory | None = None
    protocol: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)


@dataclass
class Bench:
    """What tasks work with.

    Attributes:
        load: loads ``(model, tokenizer)`` in a dtype.
        protocol: the settings that all caches share.
        data: folder of local evaluation data, or None.
        prefills: prefills that all methods share; None to prefill anew for each.
        advance: called with the share (0 to 1) of the present cell that is done.
        memo: what a task keeps for the next method, such as the full cache's distributions.
    """

    load: Callable[[torch.dtype], tuple[Any, Any]]
    protocol: Protocol = field(default_factory=Protocol)
    data: Path | None = None
    prefills: Prefills | None = None
    advance: Callable[[float], None] = lambda share: None
    memo: dict[Any, Any] = field(default_factory=dict)
    _models: dict[torch.dtype, tuple[Any, Any]] = field(default_factory=dict)

    def model(self, dtype: torch.dtype | None = None) -> Any:
        """The model in ``dtype`` (float32 if None), loaded once."""
        return self._loaded(dtype)[0]

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._loaded(None)[1]

    def reader(self, method: Method) -> Reader:
        """A reader over an empty cache of ``method``, under the present protocol."""
        model = self.model(method.dtype)
        cache = method.make(model.config, self.protocol)
        prefills = self.prefills if method.kind.shares_prefill else None
        return Reader(model, cache, self.protocol.block, method.kind.rows, prefills, self.tokenizer)

    def _loaded(self, dtype: torch.dtype | None) -> tuple[Any, Any]:
        dtype = dtype or torch.float32
        if dtype not in self._models:
            self._models[dtype] = self.load(dtype)
        return self._models[dtype]


class Task(ABC):
    """A measurement.

    Attributes:
        name: in reports and file names; it says the length where there is one: ``"fidelity@1024"``.
    """

    name: str

    @abstractmethod
    def run(self, bench: Bench, method: Method) -> Outcome:
        """Measure ``method``.

        Raises:
            ValueError: if the method cannot do this task, or its data are missing; the cell is then marked failed.
        """
