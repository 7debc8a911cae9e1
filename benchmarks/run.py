"""Run all benchmarks of the CPU one after the other, each in a process of its own (``make bench``).

    python -m benchmarks.run [--quick] [--long] [--out results/benchmarks] [--threads 2] [--isa avx2,native]

With several instruction sets, every script runs with each of them in turn before the next script begins. ``native`` is
the best one of the processor. The others force our kernels to theirs, and their files of results are named after them.
Torch keeps its own choice: the paths in torch that ours are compared with use the best instructions in every run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.session import isa_label, make_console, make_parser, result_name, start
from benchmarks.tables import make_table, show_compared
from hf_kvcache.kernels.cpu import library

SCRIPTS = (
    "bench_decode",
    "bench_prefill",
    "bench_append",
    "bench_pack",
    "bench_batch",
    "bench_load",
    "bench_memory",
    "bench_model",
    "bench_eviction",
    "bench_latent",
    "bench_sparse",
    "bench_prompts",
    "bench_assisted",
)


#: The name in ``--isa`` of the best instruction set, which is not forced.
NATIVE = "native"


def instruction_sets(names: str) -> list[str]:
    """The instruction sets in a list with commas.

    Raises:
        argparse.ArgumentTypeError: if one of them is not available here.
    """
    accepted = [NATIVE, *library.available_isas()] if library.reason_missing() is None else [NATIVE]
    found = list(dict.fromkeys(names.split(",")))
    if wrong := [name for name in found if name not in accepted]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r}; accepted here: {', '.join(accepted)}, with commas between")
    return found


def environment(isa: str) -> dict[str, str]:
    """The environment of a process that runs with an instruction set."""
    without = {name: value for name, value in os.environ.items() if name != library.ISA_VARIABLE}
    return without if isa == NATIVE else without | {library.ISA_VARIABLE: isa}


def show_by_isa(folder: Path, script: str, isas: Sequence[str], console: Console) -> None:
    """Print the figures of a script that has run with each of ``isas``, a column for each."""
    rows: dict[str, Any] = {}
    for isa in isas:
        path = folder / f"{result_name(script, '' if isa == NATIVE else isa)}.json"
        result = json.loads(path.read_text(encoding="utf-8"))
        rows[isa_label(result["machine"])] = result["rows"]
    show_compared(script, rows, console)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--long", action="store_true", help="decode steps at 131,072 tokens too")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS, help="some of the scripts")
    parser.add_argument(
        "--isa",
        type=instruction_sets,
        default=[os.environ.get(library.ISA_VARIABLE) or NATIVE],
        help="instruction sets of our kernels, with commas between; default: the best, native",
    )
    args, console = start(parser, argv), make_console()
    shared = ["--out", str(args.out)]
    shared += ["--quick"] if args.quick else []
    shared += ["--no-plots"] if args.no_plots else []
    shared += ["--threads", str(args.threads)] if args.threads else []
    table = make_table("benchmarks run", ("script", "instruction set", "seconds", "result"))
    failed = set()
    for script in args.only:
        options = [*shared, "--long"] if args.long and script == "bench_decode" else shared
        for isa in args.isa:
            console.rule(f"{script}, {isa}")
            began = time.perf_counter()
            call = [sys.executable, "-m", f"benchmarks.{script}", *options]
            code = subprocess.run(call, check=False, env=environment(isa)).returncode
            failed |= {script} if code else set()
            result = f"failed ({code})" if code else "done"
            table.add_row(script, isa, f"{time.perf_counter() - began:,.0f}", result)
    for script in args.only if len(args.isa) > 1 else ():
        if script not in failed:
            show_by_isa(args.out, script, args.isa, console)
    console.print(table)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
