"""The comparison: every cache on every task, each cell kept as soon as it is finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from itertools import cycle, zip_longest
from typing import Any

import torch
from rich.console import Console

from hf_kvcache.cli.models import load_default_model
from hf_kvcache.utils.processes import ALONE, Processes
from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.cells import Cell, Store
from hf_kvcache_eval.comparison import Comparison
from hf_kvcache_eval.prefills import Prefills
from hf_kvcache_eval.progress import shown
from hf_kvcache_eval.suites import suite
from hf_kvcache_eval.task import Bench
from hf_kvcache_eval.task_cells import TaskCells, reason


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
    bench = Bench(_loader(comparison), comparison.protocol, comparison.data, folder=comparison.out)
    bench.prefills = Prefills(_want_queries(comparison.caches)) if comparison.share_prefills else None
    done: list[Cell] = []
    turns = cycle(range(processes.count))
    total = len(entries) * len(comparison.caches) // processes.count
    with closing(bench), shown(console, total) as bar:
        bench.advance = bar.advance
        for name, entry in entries:
            mine = [cache for cache in comparison.caches if next(turns) == processes.rank]
            for cell in TaskCells(comparison, bench, store, name, entry).make(mine, bar):
                done.append(cell)
                if cell.status == "failed":
                    said = f"failed: {cell.cache} on {name}: {cell.error}"
                    console.print(said, style="red", markup=False, soft_wrap=True)
    return [cell for cells in zip_longest(*processes.gathered(done)) for cell in cells if cell is not None]


def _want_queries(caches: Sequence[str]) -> bool:
    """Whether any of the caches is shown queries; what is wrong with a spec is said when its turn comes."""
    found = []
    for cache in caches:
        with suppress(ValueError):
            found.append(Method(cache).queries)
    return any(found)


def _loader(comparison: Comparison) -> Callable[[torch.dtype], tuple[Any, Any]]:
    """Loads the model; that it cannot be loaded is remembered, so that each cell says so without trying again."""
    failed: list[Exception] = []

    def load(dtype: torch.dtype) -> tuple[Any, Any]:
        if failed:
            raise failed[0]
        try:
            return load_default_model(comparison.model, dtype, comparison.device)
        except Exception as error:
            failed.append(RuntimeError(f"model {comparison.model_name!r} cannot be loaded: {reason(error)}"))
            raise failed[0] from error

    return load
