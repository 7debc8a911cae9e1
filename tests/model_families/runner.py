"""Tries each family in a process of its own, a few at a time, and writes the results of each to a file."""

from __future__ import annotations

import importlib
import json
import os
import signal
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from tests.model_families.caches import KINDS, Kind
from tests.model_families.catalog import Family
from tests.model_families.trial import Results, try_family
from tests.model_families.verdicts import CRASHED, Verdict

#: Modules that are imported before the processes are forked: importing takes longer than trying most families.
_IMPORTED_LATE = (
    "transformers.generation.candidate_generator",
    "transformers.masking_utils",
    "sklearn.metrics",
    "torch._dynamo",
)
#: Key of the results of a family that has no model to try.
BUILDING = "building"
#: Seconds between two checks of the processes.
_PAUSE = 0.05


class Plan(NamedTuple):
    """The settings of a run: folder of the results, number of processes, seconds per family, caches."""

    folder: Path
    jobs: int = 2
    timeout: float = 240.0
    kinds: tuple[Kind, ...] = KINDS


@dataclass
class Trial:
    """A family that is being tried, and the seconds that it has run while the machine was not suspended."""

    family: Family
    seconds: float = 0.0


def run(families: list[Family], plan: Plan) -> None:
    """Try all families that have no result yet. A family that hangs or crashes gets a verdict, and others follow."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    for module in _IMPORTED_LATE:
        importlib.import_module(module)
    waiting = [family for family in families if _missing(family, plan)]
    running: dict[int, Trial] = {}
    while waiting or running:
        while waiting and len(running) < plan.jobs:
            family = waiting.pop(0)
            running[_start(family, plan)] = Trial(family)
        _reap(running, plan, len(waiting))
        time.sleep(_PAUSE)


def _missing(family: Family, plan: Plan) -> tuple[Kind, ...]:
    """The caches that a family has not been tried with."""
    known = read(family, plan.folder) or {}
    return () if BUILDING in known else tuple(kind for kind in plan.kinds if kind.name not in known)


def result_file(family: Family, folder: Path) -> Path:
    """The file with the results of a family."""
    return folder / f"{family.task}-{family.model_type}.json"


def read(family: Family, folder: Path) -> Results | None:
    """The results of a family; None if it has none."""
    file = result_file(family, folder)
    if not file.exists():
        return None
    kept: dict[str, dict[str, Any]] = json.loads(file.read_text())
    return {kind: {mode: Verdict(*verdict) for mode, verdict in modes.items()} for kind, modes in kept.items()}


def _start(family: Family, plan: Plan) -> int:
    """Start a process that tries a family. It is forked, since importing takes longer than trying most families."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        transformers.logging.set_verbosity(transformers.logging.CRITICAL)
        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        _save(family, plan.folder, _results(family, _missing(family, plan)))
    finally:
        os._exit(0)


def _results(family: Family, kinds: tuple[Kind, ...]) -> Results:
    from tests.model_families.building import NotBuilt

    try:
        return try_family(family, kinds)
    except NotBuilt as error:
        return {BUILDING: {"": Verdict("not tried", f"{error}")}}
    except Exception as error:
        return {BUILDING: {"": Verdict(CRASHED, f"{type(error).__name__}: {error}")}}


def _save(family: Family, folder: Path, results: Results) -> None:
    file, known = result_file(family, folder), read(family, folder) or {}
    results = {**known, **results}
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1))
    partial.replace(file)


def _reap(running: dict[int, Trial], plan: Plan, left: int) -> None:
    for child, trial in list(running.items()):
        trial.seconds += _PAUSE
        ended, _ = os.waitpid(child, os.WNOHANG)
        if not ended and trial.seconds < plan.timeout:
            continue
        if not ended:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        if _missing(trial.family, plan):
            reason = "died" if ended else f"took more than {plan.timeout:.0f} s"
            _save(trial.family, plan.folder, {BUILDING: {"": Verdict(CRASHED, reason)}})
        del running[child]
        print(f"{trial.family.task:>6} {trial.family.model_type:28} {trial.seconds:5.1f} s   {left} to go", flush=True)
