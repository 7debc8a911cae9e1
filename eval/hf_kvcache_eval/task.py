"""What every measurement is: a task that runs one method and returns its numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.cells import Memory, Metric, Series
from hf_kvcache_eval.peers.presses import press_of
from hf_kvcache_eval.peers.reader import PeerReader, Worker
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
        folder: of the comparison, where a task keeps what is too dear to make anew in the next run; None for nowhere.
    """

    load: Callable[[torch.dtype], tuple[Any, Any]]
    protocol: Protocol = field(default_factory=Protocol)
    data: Path | None = None
    prefills: Prefills | None = None
    advance: Callable[[float], None] = lambda share: None
    memo: dict[Any, Any] = field(default_factory=dict)
    folder: Path | None = None
    _models: dict[torch.dtype, tuple[Any, Any]] = field(default_factory=dict)

    def model(self, dtype: torch.dtype | None = None) -> Any:
        """The model in ``dtype`` (float32 if None), loaded once."""
        return self._loaded(dtype)[0]

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._loaded(None)[1]

    def reader(self, method: Method, block: int | None = None, share: bool = True) -> Reader:
        """A reader over an empty cache of ``method``, under the present protocol.

        Args:
            method: the method.
            block: tokens decoded at a time; the protocol's if None.
            share: take over the prefills of others, where the method can.
        """
        model, block = self.model(method.dtype), block or self.protocol.block
        if method.kind.elsewhere:
            return self._peer(method, block)
        cache = method.make(model.config, self.protocol)
        prefills = self.prefills if share and method.kind.shares_prefill else None
        return Reader(model, cache, block, method.kind.rows, prefills, self.tokenizer)

    def close(self) -> None:
        """End the other library's process, if there is one."""
        if "peer" in self.memo:
            self.memo.pop("peer").close()

    def _peer(self, method: Method, block: int) -> Reader:
        """A reader of another library, whose process goes on from one reader to the next."""
        if "peer" not in self.memo or not self.memo["peer"].alive:
            self.memo["peer"] = Worker(self.model())
        return PeerReader(self.model(), self.memo["peer"], press_of(method.spec), block, self.protocol.seed)

    def _loaded(self, dtype: torch.dtype | None) -> tuple[Any, Any]:
        dtype = dtype or torch.float32
        if dtype not in self._models:
            self._models[dtype] = self.load(dtype)
        return self._models[dtype]


@dataclass
class Piece:
    """What a task found on some of its samples. It is kept as JSON until all of them are measured.

    Attributes:
        found: by name, one entry a sample: a number, or a list of numbers.
        memory: bytes after the prefill.
        timing: seconds and counts, which are added up over the pieces.
    """

    found: dict[str, list[Any]]
    memory: Memory | None = None
    timing: dict[str, float] = field(default_factory=dict)

    @classmethod
    def joined(cls, pieces: Sequence[Piece]) -> Piece:
        """One piece with the samples of all, in their order; the memory is that of the last."""
        found: dict[str, list[Any]] = {}
        timing: dict[str, float] = {}
        for piece in pieces:
            for name, samples in piece.found.items():
                found.setdefault(name, []).extend(samples)
            for name, amount in piece.timing.items():
                timing[name] = timing.get(name, 0) + amount
        return cls(found, pieces[-1].memory, timing)


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


class TaskInPieces(Task):
    """A measurement whose samples are measured a few at a time.

    A comparison measures the first piece of every cache, then the second one. So a prompt is prefilled once, and only
    the prefill of one piece is held.
    """

    @abstractmethod
    def count(self, bench: Bench) -> int:
        """How many pieces there are, the same for every method."""

    @abstractmethod
    def measure(self, bench: Bench, method: Method, index: int) -> Piece:
        """Measure ``method`` on the samples of the ``index``-th piece; raises as :meth:`run` does."""

    @abstractmethod
    def outcome(self, bench: Bench, found: Piece) -> Outcome:
        """The task's numbers from all pieces, joined."""

    def run(self, bench: Bench, method: Method) -> Outcome:
        pieces, count = [], self.count(bench)
        for index in range(count):
            pieces.append(self.measure(bench, method, index))
            bench.advance((index + 1) / count)
        return self.outcome(bench, Piece.joined(pieces))
