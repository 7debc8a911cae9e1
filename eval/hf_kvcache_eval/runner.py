"""The comparison: every cache on every task, one cell at a time, each kept as soon as it is finished."""

from __future__ import annotations

import gc
import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from datetime import datetime, timezone
from itertools import cycle, zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hf_kvcache.cli.models import DEFAULT_MODEL_NAME, load_default_model
from hf_kvcache.kernels.dispatch import backends
from hf_kvcache.utils.environment import machine, versions
from hf_kvcache.utils.processes import ALONE, Processes
from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.cells import Cell, Store
from hf_kvcache_eval.prefills import Prefills
from hf_kvcache_eval.protocol import Protocol
from hf_kvcache_eval.suites import Entry, suite
from hf_kvcache_eval.task import Bench, Outcome

_LOG = logging.getLogger(__name__)


@dataclass
class Comparison:
    """What is to be compared.

    Attributes:
        out: folder of the cells.
        caches: cache specs, as text.
        model: hub id or local path; None for the default model.
        suite: name of the suite.
        tasks: other tasks than the suite's, separated by commas or spaces.
        limit: samples of every task in place of the suite's.
        protocol: what is held equal; its seed is the comparison's.
        data: folder of local evaluation data.
        device: where the model runs.
        share_prefills: prefill a prompt once for all caches whose contents do not depend on queries.
    """

    out: Path
    caches: Sequence[str]
    model: str | None = None
    suite: str = "quick"
    tasks: str | None = None
    limit: int | None = None
    protocol: Protocol = field(default_factory=lambda: Protocol(block=16))
    data: Path | None = None
    device: str = "cpu"
    share_prefills: bool = True

    @property
    def model_name(self) -> str:
        """The model's name in results."""
        return model_name(self.model)

    def command(self, cache: str, task: str) -> str:
        """The command that makes one cell again."""
        words = ["hf-kvcache-eval", "run", "--suite", self.suite, "--caches", cache, "--tasks", task]
        words += ["--model", self.model_name] if self.model else []
        words += ["--limit", str(self.limit)] if self.limit else []
        for option in fields(Protocol):
            value = getattr(self.protocol, option.name)
            if value != _DEFAULT_PROTOCOL[option.name]:
                words += [f"--{option.name.replace('_', '-')}", str(value)]
        return shlex.join(words)


def model_name(model: str | None) -> str:
    """A model's name in results: of a local folder only its last part, since where it lies says nothing."""
    if model is None:
        return DEFAULT_MODEL_NAME
    return Path(model).name if Path(model).is_dir() else model


_DEFAULT_PROTOCOL = asdict(Protocol(block=16))


def run(comparison: Comparison, console: Console, processes: Processes = ALONE) -> list[Cell]:
    """Make all cells that are not there yet.

    Args:
        comparison: what is to be compared.
        console: where progress is shown.
        processes: that take the cells by turns, and share the folder.

    Returns:
        Every cell asked for, finished before or now; failed ones have the status ``"failed"`` and say why.

    Raises:
        ValueError: if nothing can be run at all: an unknown suite, no caches.
    """
    entries = suite(comparison.suite, comparison.tasks, comparison.limit)
    if not comparison.caches:
        raise ValueError("caches is empty; accepted: at least one cache spec")
    store = Store(comparison.out)
    bench = Bench(load=_loader(comparison), protocol=comparison.protocol, data=comparison.data)
    bench.prefills = Prefills(_want_queries(comparison.caches)) if comparison.share_prefills else None
    done: list[Cell] = []
    turns = cycle(range(processes.count))
    with _progress(console, len(entries) * len(comparison.caches) // processes.count) as (start, advance, finish):
        bench.advance = advance
        for name, entry in entries:
            if bench.prefills is not None:
                bench.prefills.clear()
            for cache in comparison.caches:
                if next(turns) != processes.rank:
                    continue
                start(f"{cache} on {name}")
                cell = _cell(comparison, bench, store, cache, name, entry)
                done.append(cell)
                finish()
                if cell.status == "failed":
                    console.print(f"failed: {cache} on {name}: {cell.error}", style="red", markup=False, soft_wrap=True)
    return [cell for cells in zip_longest(*processes.gathered(done)) for cell in cells if cell is not None]


def _want_queries(caches: Sequence[str]) -> bool:
    """Whether any of the caches is shown queries; what is wrong with a spec is said when its turn comes."""
    found = []
    for cache in caches:
        with suppress(ValueError):
            found.append(Method(cache).kind.queries)
    return any(found)


def _cell(comparison: Comparison, bench: Bench, store: Store, cache: str, name: str, entry: Entry | ValueError) -> Cell:
    """One cell: what the folder has if it was measured in the same way, else measured now and kept."""
    wanted = _blank(comparison, cache, name, entry)
    found = store.read(cache, name)
    if found is not None and found.status == "done" and _same(found, wanted, entry):
        return found
    timing: dict[str, Any] = {}
    try:
        if isinstance(entry, ValueError):
            raise entry
        outcome = _measure(replace(comparison.protocol, **entry.protocol), bench, cache, entry)
        _fill(wanted, bench, outcome)
        timing = outcome.timing | {"date": datetime.now(timezone.utc).date().isoformat()}
        store.write(wanted, timing)
    except Exception as error:  # one cell's failure, out of memory included, must not cost the others
        _LOG.debug("cell failed", exc_info=True)
        wanted = replace(wanted, status="failed", error=_reason(error), metrics={}, series={}, memory=None)
        store.write(wanted, timing)
        gc.collect()
    return wanted


def _measure(protocol: Protocol, bench: Bench, cache: str, entry: Entry) -> Outcome:
    method = Method(cache)
    shared, bench.protocol = bench.protocol, protocol
    try:
        return entry.task.run(bench, method)
    finally:
        bench.protocol = shared


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
        versions=versions(),
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


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _loader(comparison: Comparison) -> Callable[[torch.dtype], tuple[Any, Any]]:
    """Loads the model; that it cannot be loaded is remembered, so that each cell says so without trying again."""
    failed: list[Exception] = []

    def load(dtype: torch.dtype) -> tuple[Any, Any]:
        if failed:
            raise failed[0]
        try:
            return load_default_model(comparison.model, dtype, comparison.device)
        except Exception as error:
            failed.append(RuntimeError(f"model {comparison.model_name!r} cannot be loaded: {_reason(error)}"))
            raise failed[0] from error

    return load


@contextmanager
def _progress(
    console: Console, cells: int
) -> Iterator[tuple[Callable[[str], None], Callable[[float], None], Callable[[], None]]]:
    """A bar over all cells that moves within them, with the time left; yields start, advance and finish of a cell."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("", total=cells)
        finished = 0

        def start(what: str) -> None:
            progress.update(bar, description=what)

        def advance(share: float) -> None:
            progress.update(bar, completed=finished + min(share, 1.0))

        def finish() -> None:
            nonlocal finished
            finished += 1
            progress.update(bar, completed=finished)

        yield start, advance, finish
