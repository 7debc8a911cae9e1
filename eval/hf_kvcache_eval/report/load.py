"""The folder of one comparison, read for a report."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

from hf_kvcache_eval.cells import Cell, Memory, Metric, Store
from hf_kvcache_eval.report.names import TaskName, is_full, is_noise_floor

FIDELITY, SPEED = "fidelity", "speed"
QUOTES = ("quote", "longctx_quote")
#: Headline metrics of tasks that look for something in the context.
FOUND = ("recall", "exact")


@dataclass(frozen=True)
class Time:
    """Milliseconds a decoded token: quartiles over what was timed.

    ``prefill`` is in seconds, and so is ``compress``, the part of it behind the model's own pass.
    """

    low: float
    median: float
    high: float
    prefill: float | None
    compress: float | None = None


@dataclass
class Comparison:
    """What a folder holds.

    Attributes:
        done: finished cells by ``(cache, task)``.
        failed: cells that are marked failed.
        unreadable: names of files that are no cells.
        timings: by ``(cache, task)``.
    """

    done: dict[tuple[str, str], Cell] = field(default_factory=dict)
    failed: list[Cell] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    timings: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    @property
    def cells(self) -> list[Cell]:
        """Every cell, failed ones too."""
        return [*self.done.values(), *self.failed]

    @property
    def caches(self) -> list[str]:
        """Caches of all cells, by name."""
        return sorted({cell.cache for cell in self.cells})

    @property
    def tasks(self) -> list[TaskName]:
        """Tasks of all cells: by name, then by length."""
        return sorted((TaskName.of(text) for text in {cell.task for cell in self.cells}), key=lambda task: task.order)

    @property
    def fidelity(self) -> list[TaskName]:
        """Fidelity tasks, shortest prefix first."""
        return [task for task in self.tasks if task.base == FIDELITY]

    @property
    def quotes(self) -> list[TaskName]:
        """Quotation tasks."""
        return [task for task in self.tasks if task.base in QUOTES]

    @property
    def retrieval(self) -> list[TaskName]:
        """Tasks that look for strings: their headline metric is ``recall``, or ``exact`` where the answer is given."""
        return [task for task in self.tasks if self.headline_name(task.text) in FOUND]

    @property
    def language(self) -> list[TaskName]:
        """lm-eval's tasks: all that are none of the others."""
        own = {task.text for task in (*self.fidelity, *self.quotes, *self.retrieval)}
        return [
            task for task in self.tasks if task.text not in own and task.base != SPEED and self.headline_name(task.text)
        ]

    @property
    def noise_floor(self) -> str | None:
        """The full cache in another dtype, if it was measured."""
        return next((cache for cache in self.caches if is_noise_floor(cache)), None)

    def cell(self, cache: str, task: str) -> Cell | None:
        """The finished cell of a cache on a task."""
        return self.done.get((cache, task))

    def metric(self, cache: str, task: str, name: str | None = None) -> Metric | None:
        """A metric of a finished cell, the headline metric if no name is given."""
        cell = self.cell(cache, task)
        name = name or self.headline_name(task)
        return None if cell is None or name is None else cell.metrics.get(name)

    def headline_name(self, task: str) -> str | None:
        """The first metric of a task; None if no cache finished it."""
        return next((next(iter(cell.metrics)) for cell in self.on(task) if cell.metrics), None)

    def on(self, task: str) -> list[Cell]:
        """Finished cells of a task, the full cache first."""
        found = [cell for (_, name), cell in self.done.items() if name == task]
        return sorted(found, key=lambda cell: (not is_full(cell.cache), cell.cache))

    @property
    def memory_task(self) -> str | None:
        """The task whose bytes stand for a cache: one for all, because bytes a token depend on the length."""
        longest = sorted(self.tasks, key=lambda task: (task.base == FIDELITY, task.base == SPEED, task.length or 0))
        for task in reversed(longest):
            if any(cell.memory for cell in self.on(task.text)):
                return task.text
        return None

    def memory(self, cache: str, task: str | None = None) -> Memory | None:
        """Bytes of a cache in ``task``, if that measured bytes at all; else in :attr:`memory_task`."""
        if task is None or not any(cell.memory for cell in self.on(task)):
            task = self.memory_task
        cell = None if task is None else self.cell(cache, task)
        return None if cell is None else cell.memory

    @property
    def speed_task(self) -> str | None:
        """The longest task that has milliseconds a token."""
        timed = [TaskName.of(task) for cache, task in sorted(self.timings) if self.time(cache, task)]
        longest = max(timed, key=lambda task: (task.base == SPEED, task.length or 0), default=None)
        return longest.text if longest else None

    def time(self, cache: str, task: str) -> Time | None:
        """Milliseconds a decoded token; None where they were not taken."""
        timing = self.timings.get((cache, task), {})
        found = timing.get("decode_ms") or timing.get("decode_ms_per_token") or []
        steps = [float(x) for x in (found if isinstance(found, list) else [found]) if isinstance(x, int | float)]
        if not steps:
            return None
        low, middle, high = quantiles(steps, n=4, method="inclusive") if len(steps) > 1 else steps * 3
        taken = [timing.get(name) for name in ("prefill_seconds", "compress_seconds")]
        return Time(low, middle, high, *(x if isinstance(x, int | float) else None for x in taken))


def load(folder: Path) -> Comparison:
    """Read a comparison.

    Raises:
        ValueError: if the folder has no cell that can be read.
    """
    store, found = Store(folder), Comparison()
    for path in sorted(store.cells.glob("*.json")):
        try:
            cell = Cell.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            found.unreadable.append(path.name)
            continue
        if cell.status != "done":
            found.failed.append(cell)
            continue
        found.done[cell.cache, cell.task] = cell
        found.timings[cell.cache, cell.task] = _timing(store, cell)
    if not found.cells:
        raise ValueError(f"folder={str(folder)!r} has no readable cells; make some with `hf-kvcache-eval run`")
    return found


def distinct(values: Iterable[Any]) -> list[Any]:
    """``values`` without repetitions and empty ones, in their order; dictionaries too."""
    return [json.loads(text) for text in dict.fromkeys(json.dumps(value) for value in values if value)]


def _timing(store: Store, cell: Cell) -> dict[str, Any]:
    try:
        found = store.timing(cell)
    except (OSError, ValueError):  # times are an extra; a broken file of them costs no result
        return {}
    return found if isinstance(found, dict) else {}
