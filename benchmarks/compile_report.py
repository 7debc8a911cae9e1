"""Every Triton kernel compiled for every target without a GPU, and what the machine code says about it.

    python -m benchmarks.compile_report                          all targets, all cases
    python -m benchmarks.compile_report --quick                  three targets, the first case of each operation
    python -m benchmarks.compile_report --target sm90 --case int4
    python -m benchmarks.compile_report --record                 take the instructions per byte as the new expectation

Fails (exit status 1) where a kernel spills registers or uses a stack, wants more shared memory than there is, does not
use tensor cores though it should, leaves fewer than 8 warps on a multiprocessor, loads less than half of its bytes by
128-bit loads, or needs 5 % more or fewer instructions for a byte than recorded in compiled.json. A case may waive some
of that if it says why; what is waived is marked in the table by an asterisk and listed below it with its reason.

The column *static bound* is no measurement of speed: it is the share of a GPU's memory bandwidth at which the main
loop's instructions take every issue slot there is. A kernel cannot do better; how much worse it does, only a GPU tells.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

RECORD = Path(__file__).with_name("compiled.json")
QUICK_TARGETS = ("sm80", "sm90", "gfx942")


def main() -> int:
    """Compile, print, check; the exit status."""
    args = arguments()
    console = Console(width=None if sys.stdout.isatty() else 170)
    reason = missing()
    if reason:
        console.print(f"compile_report: {escape(reason)}", soft_wrap=True)
        return 2
    from benchmarks.compiling.build import operations

    work = selected(args, operations())
    if not work:
        console.print("compile_report: no case has such a name")
        return 2
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        results = compiled(work, args.jobs)
    complete = not (args.quick or args.target or args.case)
    if args.record:
        write_record(results, complete)
    record, comparable = read_record()
    wrong = problems(work, results, record if comparable else {}, comparable)
    if complete and comparable:
        wrong += stale(results, record)
    console.print(table(work, results, {name for name, _ in wrong}))
    for line in waivers(work, results):
        console.print(escape(line), soft_wrap=True)
    if not comparable:
        console.print(f"The recorded values are of another triton than {version()} and were not compared.")
    for name, reason in wrong:
        console.print(f"[red]{escape(name)}[/red]: {escape(reason)}", soft_wrap=True)
    console.print(f"{len(results)} kernels, {len(wrong)} failures")
    return 1 if wrong else 0


def arguments() -> argparse.Namespace:
    """The command line."""
    from benchmarks.compiling.targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three targets, the first case of each operation")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this target (may be repeated)")
    parser.add_argument("--case", help="only cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--record", action="store_true", help="write instructions per byte to compiled.json")
    return parser.parse_args()


def missing() -> str | None:
    """What is missing on this machine, in words."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install -e .[dev]` brings it"
    # An interpreted kernel cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    from benchmarks.compiling.nvidia import missing_tools

    tools = missing_tools()
    if tools:
        return f"this build of triton came without {', '.join(tools)}"
    return None


Work = list[tuple[str, str, int, Any]]


def selected(args: argparse.Namespace, operations: list[str]) -> Work:
    """What to compile: operation, target, index among its cases, and the case."""
    from benchmarks.compiling.build import cases
    from benchmarks.compiling.targets import TARGETS

    work: Work = []
    for target in args.target or (QUICK_TARGETS if args.quick else TARGETS):
        for operation in operations:
            for index, case in enumerate(cases(operation, target)):
                if (args.case or "") in case.name and not (args.quick and index):
                    work.append((operation, target, index, case))
    return work


def compiled(work: Work, jobs: int) -> list[Any]:
    """The measurements, in the order of ``work``."""
    from benchmarks.compiling.build import build

    if jobs == 1:
        return [build(*item[:3]) for item in track(work, "compiling", transient=True)]
    # A fresh interpreter for each: a forked one would share the state of LLVM.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(build, *item[:3]) for item in work]
        for _ in track(as_completed(futures), "compiling", total=len(futures), transient=True):
            pass
        return [future.result() for future in futures]


def problems(
    work: Work, results: list[Any], record: dict[str, dict[str, float]], compare: bool
) -> list[tuple[str, str]]:
    """Name and reason of everything that is not as it should be."""
    from benchmarks.compiling.measured import failures

    found = [
        (f"{result.target} {result.case}", reason)
        for (*_, case), result in zip(work, results, strict=True)
        for reason in failures(result, case, record.get(result.target, {}).get(result.case), compare)
    ]
    names = Counter(f"{result.target} {result.case}" for result in results)
    return found + [(name, f"{count} cases have this name") for name, count in names.items() if count > 1]


def stale(results: list[Any], record: dict[str, dict[str, float]]) -> list[tuple[str, str]]:
    """Recorded values of cases that are no more."""
    present = {(result.target, result.case) for result in results}
    names = [(target, case) for target, values in record.items() for case in values]
    return [(f"{t} {c}", "is recorded, but there is no such case") for t, c in names if (t, c) not in present]


def version() -> str:
    """The version of triton, on whose compilers all numbers depend."""
    import triton

    return str(triton.__version__)


def read_record() -> tuple[dict[str, dict[str, float]], bool]:
    """Instructions per byte by target and case, and whether they are of this version of triton."""
    if not RECORD.exists():
        return {}, True
    content = json.loads(RECORD.read_text())
    return content["instructions_per_byte"], content["triton"] == version()


def write_record(results: list[Any], complete: bool) -> None:
    """Record the instructions per byte of ``results``, in place of all others if they are complete."""
    old, comparable = read_record()
    values = {} if complete or not comparable else old
    for result in results:
        if result.instructions_per_byte is not None:
            values.setdefault(result.target, {})[result.case] = round(result.instructions_per_byte, 5)
    ordered = {target: dict(sorted(values[target].items())) for target in sorted(values)}
    RECORD.write_text(json.dumps({"triton": version(), "instructions_per_byte": ordered}, indent=1) + "\n")


def waivers(work: Work, results: list[Any]) -> list[str]:
    """Every reason for which something is waived, and of which cases what."""
    from benchmarks.compiling.measured import unmet_criteria

    lines: dict[tuple[str, str], list[str]] = {}
    for (*_, case), result in zip(work, results, strict=True):
        unmet = unmet_criteria(result, case)
        for criterion in unmet.keys() & case.waived.keys():
            named = f"  {result.target} {case.name}: {unmet[criterion]}"
            lines.setdefault((criterion, case.waived[criterion]), []).append(named)
    groups = ([f"* {criterion} waived: {reason}", *named] for (criterion, reason), named in sorted(lines.items()))
    return [line for group in groups for line in group]


def table(work: Work, results: list[Any], wrong: set[str]) -> Table:
    """One row for each kernel and target."""
    from benchmarks.compiling.measured import SPILLS, WARPS, WIDE_LOADS
    from benchmarks.compiling.targets import TARGETS

    made = Table(title=f"Triton {version()}, compiled without a GPU")
    for column in ("target", "case"):
        made.add_column(column, no_wrap=True)
    for column in ("regs", "spills", "stack", "shared\nKiB", "tensor\ninstr.", "warps\n/ SM", "128-bit\nloads"):
        made.add_column(column, justify="right")
    made.add_column("loop instr.\n(x turns)", justify="right")
    made.add_column("warp instr.\n/ byte", justify="right")
    made.add_column("static bound, not measured:\nshare of memory bandwidth")
    for (*_, case), result in zip(work, results, strict=True):
        name = f"{result.target} {result.case}"
        spill, warp, wide = ("*" if criterion in case.waived else "" for criterion in (SPILLS, WARPS, WIDE_LOADS))
        style = "red" if name in wrong else None
        if result.resources is None:
            made.add_row(result.target, result.case, *["-"] * 10, style=style)
            continue
        target, r, per_byte = TARGETS[result.target], result.resources, result.instructions_per_byte
        bound = "-"
        if per_byte is not None:
            bound = ", ".join(f"{gpu.name} {target.bandwidth_bound(gpu, per_byte):.0%}" for gpu in target.gpus)
        loop = f"{result.loop_instructions}" + (f" x{result.turns}" if result.turns > 1 else "")
        cells = [r.registers, f"{r.spills}{spill}", f"{r.stack_bytes}{spill}", f"{r.shared_bytes / 1024:.1f}"]
        cells += [result.tensor_instructions, f"{result.warps}{warp}", f"{result.wide:.0%}{wide}", loop]
        cells += ["-" if per_byte is None else f"{per_byte:.4f}", bound]
        made.add_row(result.target, result.case, *map(str, cells), style=style)
    return made


if __name__ == "__main__":
    sys.exit(main())
