"""The cells of one task: which of them are there, and what makes the others."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from datetime import datetime, timezone
from typing import Any

from hf_kvcache.kernels.dispatch import backends
from hf_kvcache.utils.environment import machine, versions
from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.cells import Cell, Memory, Store
from hf_kvcache_eval.comparison import Comparison
from hf_kvcache_eval.peers import environment as peers
from hf_kvcache_eval.peers.presses import PREFIX
from hf_kvcache_eval.progress import Bar
from hf_kvcache_eval.suites import Entry
from hf_kvcache_eval.task import Bench, Outcome, Piece, TaskInPieces

_LOG = logging.getLogger(__name__)


class TaskCells:
    """The cells of one task: what the folder has if it was measured in the same way, else measured now and kept."""

    def __init__(
        self, comparison: Comparison, bench: Bench, store: Store, name: str, entry: Entry | ValueError
    ) -> None:
        self.comparison, self.bench, self.store, self.name, self.entry = comparison, bench, store, name, entry

    def make(self, caches: Sequence[str], bar: Bar) -> list[Cell]:
        """The cells of ``caches`` in their order."""
        made: dict[str, Cell] = {}
        for cache in caches:
            wanted = _blank(self.comparison, cache, self.name, self.entry)
            found = self.store.read(cache, self.name)
            same = found is not None and found.status == "done" and _same(found, wanted, self.entry)
            made[cache] = found if found is not None and same else wanted
        bar.finish(sum(bool(cell.metrics) for cell in made.values()))
        left = [cell for cell in made.values() if not cell.metrics]
        self._forget()
        entry, shared = self.entry, self.bench.protocol
        if isinstance(entry, Entry):
            self.bench.protocol = replace(self.comparison.protocol, **entry.protocol)
        try:
            if isinstance(entry, Entry) and isinstance(entry.task, TaskInPieces):
                made |= self._in_pieces(left, entry.task, bar)
            else:
                made |= {cell.cache: self._whole(cell, bar) for cell in left}
        finally:
            self.bench.protocol = shared
        return list(made.values())

    def _whole(self, wanted: Cell, bar: Bar) -> Cell:
        """A cell whose task measures all samples at once."""
        bar.start(f"{wanted.cache} on {self.name}")
        try:
            if isinstance(self.entry, ValueError):
                raise self.entry
            return self._kept(wanted, self.entry.task.run(self.bench, Method(wanted.cache)))
        except Exception as error:  # one cell's failure, out of memory included, must not cost the others
            return self._failed(wanted, error)
        finally:
            bar.finish()

    def _in_pieces(self, left: list[Cell], task: TaskInPieces, bar: Bar) -> dict[str, Cell]:
        """Cells piece by piece, every piece on all caches before the next one."""
        made: dict[str, Cell] = {}
        pieces = {cell.cache: self._pieces(cell) for cell in left}
        index, count = 0, 1
        while index < count:
            self._forget()
            for at, cell in enumerate(left):
                if cell.cache in made:
                    continue
                bar.start(f"{cell.cache} on {self.name}", len(left), (index + at / len(left)) / count)
                try:
                    count = task.count(self.bench)
                    found = pieces[cell.cache]
                    if len(found) == index:
                        found.append(task.measure(self.bench, Method(cell.cache), index))
                        self.store.write_pieces(cell, [asdict(piece) for piece in found])
                    if index == count - 1:
                        made[cell.cache] = self._kept(cell, task.outcome(self.bench, Piece.joined(found)))
                except Exception as error:  # as above
                    made[cell.cache] = self._failed(cell, error)
            index += 1
        bar.finish(len(left))
        return made

    def _pieces(self, wanted: Cell) -> list[Piece]:
        """The pieces of a cell that an interrupted run kept, if it measured as this one does."""
        kept = self.store.read_pieces(wanted.cache, self.name)
        if kept is None or not _same(kept[0], wanted, self.entry):
            return []
        return [
            Piece(piece["found"], piece["memory"] and Memory(**piece["memory"]), piece["timing"]) for piece in kept[1]
        ]

    def _kept(self, cell: Cell, outcome: Outcome) -> Cell:
        """The finished cell."""
        cell = replace(cell)
        _fill(cell, self.bench, outcome)
        date = {"date": datetime.now(timezone.utc).date().isoformat()}
        self.store.write(cell, outcome.timing | date)
        return cell

    def _failed(self, wanted: Cell, error: Exception) -> Cell:
        """The cell of a measurement that failed."""
        _LOG.debug("cell failed", exc_info=True)
        cell = replace(wanted, status="failed", error=reason(error), metrics={}, series={}, memory=None)
        self.store.write(cell, {})
        gc.collect()
        return cell

    def _forget(self) -> None:
        """Forget the prefills of other samples."""
        if self.bench.prefills is not None:
            self.bench.prefills.clear()


def _blank(comparison: Comparison, cache: str, name: str, entry: Entry | ValueError) -> Cell:
    """The cell before it is measured: all that says how it is going to be."""
    protocol = asdict(comparison.protocol)
    if isinstance(entry, Entry):
        protocol |= entry.protocol
        protocol["settings"] = asdict(entry.task) if is_dataclass(entry.task) else {}
    return Cell(
        cache=cache,
        task=name,
        protocol=protocol,
        model={"name": comparison.model_name},
        versions=versions() | (peers.versions() if cache.startswith(PREFIX) else {}),
        machine=machine(comparison.device) | {"kernels": backends(comparison.device)},
        seed=comparison.protocol.seed,
        command=comparison.command(cache, name),
    )


def _same(found: Cell, wanted: Cell, entry: Entry | ValueError) -> bool:
    """Whether a finished cell was measured as it would be now; on which machine does not matter."""
    # Through JSON, as tuples come back as lists.
    wanted = Cell.from_json(wanted.to_json())
    # A setting that the cell does not know came later: it was measured with what is now the default.
    found.protocol["settings"] = _defaults(entry) | found.protocol.get("settings", {})
    return (
        found.seed == wanted.seed
        and found.versions == wanted.versions
        and found.model.get("name") == wanted.model["name"]
        and all(found.protocol.get(key) == value for key, value in wanted.protocol.items())
    )


def _defaults(entry: Entry | ValueError) -> dict[str, Any]:
    """The settings that a task has if nobody sets them."""
    task: Any = entry.task if isinstance(entry, Entry) else None
    if not is_dataclass(task):
        return {}
    return {option.name: option.default for option in fields(task) if option.default is not MISSING}


def _fill(cell: Cell, bench: Bench, outcome: Outcome) -> None:
    cell.metrics, cell.series, cell.memory = outcome.metrics, outcome.series, outcome.memory
    cell.protocol |= {key: value for key, value in outcome.protocol.items() if key not in cell.protocol}
    dtype = Method(cell.cache).dtype
    model = bench.model(dtype)
    cell.model |= {
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
