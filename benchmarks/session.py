"""What every benchmark shares: its options, the machine it ran on, its file of results and its table."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import plots
from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.dispatch import backends
from hf_kvcache.utils.environment import cpu_model, machine, versions

RESULTS = Path("results/benchmarks")
Row = dict[str, Any]


def make_console() -> Console:
    """A console on stdout, wide enough for the tables where stdout is a file."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats: does it run, and roughly")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files and plots")
    parser.add_argument("--no-plots", action="store_true", help="write no PNG files")
    parser.add_argument("--threads", type=int, help="threads of torch; default: as torch chooses")
    return parser


def start(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments and set the number of threads."""
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def pick(given: list[Any] | None, quick: bool, default: list[Any], small: list[Any]) -> list[Any]:
    """What was asked for, else the default of a full or of a quick run."""
    return given or (small if quick else default)


@dataclass
class Report:
    """What a benchmark found out.

    Attributes:
        script: name of the benchmark, which is also the name of its file.
        device: where it runs.
        rows: one dictionary for each measurement.
        notes: sentences on what was done and what was left out.
        facts: further results that are not rows (the bandwidth).
    """

    script: str
    device: str = "cpu"
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: Row = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Add a sentence, once."""
        if text not in self.notes:
            self.notes.append(text)

    def finish(self, args: argparse.Namespace, console: Console) -> Path:
        """Print the notes, write the JSON file and the plots; returns the file's path.

        Raises:
            ValueError: if a number of a row is not finite.
        """
        kernels = ", ".join(f"{op} {backend}" for op, backend in backends(self.device).items())
        self.note(f"Our kernels: {kernels}.{_on_cpu()}")
        for note in self.notes:
            console.print(f"- {note}")
        path = self.save(args)
        console.print(f"wrote {path}")
        if not args.no_plots:
            console.print(plots.draw(path))
        return path

    def save(self, args: argparse.Namespace) -> Path:
        """Write the JSON file with what there is; returns its path.

        Raises:
            ValueError: if a number of a row is not finite.
        """
        _check_finite(self.rows)
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"{result_name(self.script, forced_isa())}.json"
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "no_plots")}
        payload = {
            "script": self.script,
            "command": command(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(self.device) | {"kernels": backends(self.device), "isa": _isa()} | _forced(),
            "versions": versions(),
            "settings": settings,
            "facts": self.facts,
            "notes": self.notes,
            "rows": self.rows,
        }
        path.write_text(json.dumps(payload, indent=1, default=str) + "\n", encoding="utf-8")
        return path


def forced_isa() -> str:
    """The instruction set that the environment names for our kernels; empty where they take the best one."""
    return os.environ.get(library.ISA_VARIABLE, "")


def result_name(script: str, isa: str) -> str:
    """The name of a file of results: of the script, with the instruction set ``isa`` where one was forced."""
    return f"{script}-{isa}" if isa else script


def isa_label(machine: Row) -> str:
    """How tables name the instruction set of a file of results, given its ``machine``."""
    isa = machine.get("isa")
    return str(machine.get("forced_isa") or (f"native ({isa})" if isa else "native"))


def _forced() -> dict[str, str]:
    return {"forced_isa": forced_isa()} if forced_isa() else {}


def _isa() -> str | None:
    """The instruction set of our kernels on the CPU; None where they are not compiled."""
    return library.isa() if library.reason_missing() is None else None


def _on_cpu() -> str:
    """A sentence that names the processor and the instruction set."""
    isa = _isa()
    return "" if isa is None else f" Processor: {cpu_model()}; instruction set: {isa}."


def _check_finite(rows: list[Row]) -> None:
    for row in rows:
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}={value!r} in {row!r}")


def command() -> str:
    """The command line, without the path of the script and of ``--out``, which only say where files lie."""
    words = sys.argv[1:]
    if "--out" in words:
        at = words.index("--out")
        words = words[:at] + words[at + 2 :]
    words = [word for word in words if not word.startswith("--out=")]
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *words])
