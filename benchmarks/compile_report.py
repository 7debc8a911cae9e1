"""Every Triton kernel compiled for every target without a GPU, and what the machine code says about it.

    python -m benchmarks.compile_report                          all targets, all cases
    python -m benchmarks.compile_report --quick                  three targets, the first case of each operation
    python -m benchmarks.compile_report --target sm90 --case int4
    python -m benchmarks.compile_report --record                 take what was measured as the new expectation
    python -m benchmarks.compile_report --triton 3.6.0           with another Triton, installed into a folder of its own

Fails (exit status 1) where a kernel does not compile, spills registers or uses a stack, wants more shared memory than
there is, does not use tensor cores though it should, or leaves fewer than 8 warps on a multiprocessor; a case may waive
some of that. It fails too where a kernel is worse than compiled.csv records for the same version of Triton: more
registers, spills, stack or shared memory, fewer tensor or 128-bit load instructions, or 5 % more instructions, all of
them or in the main loop. And it fails where the main loop leaves room for less of the memory bandwidth than a case asks
for: the column "bound" is the share at which the loop takes every issue slot there is. None of this is a measurement of
speed.

compiled.csv holds several versions of Triton. The tiles are chosen for the newest of them. With an older one, recorded
spills, few warps and a low bound are printed, and only what is worse than recorded is a failure.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import machine_code
from benchmarks.compile_record import RECORD, Record, is_older, read_record, version, write_record
from benchmarks.machine_code import FIELDS, TARGETS, Compiled

QUICK_TARGETS = ("sm80", "sm90", "gfx942")
LEAST_WARPS = 8
SPILLS, WARPS = "spills", "warps"
#: How the problems of these two end, and that of a waiver of one of them.
_SPILLED, _FEW_WARPS, _NEEDLESS = "bytes of stack", "are wanted", "are waived without need"
#: How many per cent a figure may be above its recorded value; figures of ``_MORE_IS_BETTER`` may not fall.
_MARGIN = {"instructions": 5, "loop": 5}
_MORE_IS_BETTER = ("tensor", "wide_loads")


@dataclass(frozen=True)
class Result:
    """One case compiled for one target.

    Attributes:
        target: name of the target.
        case: name of the case.
        compiled: what came out; None if it could not be compiled.
        warps: of its programs.
        problems: what is wrong with it, in words.
        share: the share of memory bandwidth that its main loop leaves room for; None if that is not known.
        least_share: what it is to be at least.
    """

    target: str
    case: str
    compiled: Compiled | None
    warps: int
    problems: tuple[str, ...]
    share: float | None = None
    least_share: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        """What the record knows it by."""
        return self.target, self.case


def main() -> int:
    """Compile, print, check; the exit status."""
    args, console = arguments(), Console(width=None if sys.stdout.isatty() else 150)
    if args.triton:
        return with_triton(args.triton)
    if reason := machine_code.missing():
        console.print(f"compile_report: {reason}", markup=False, soft_wrap=True)
        return 2
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        results = compiled(selected(args), args.jobs)
    complete = not (args.quick or args.target or args.case)
    if args.record:
        write_record({r.key: vars(r.compiled) for r in results if r.compiled is not None}, complete)
    record, older = read_record(), is_older()
    console.print(table(results))
    excused = [(result.key, problem) for result in results for problem in known(result, record, older)]
    for key, problem in excused:
        console.print(f"{' '.join(key)}: {problem}, as recorded", markup=False, soft_wrap=True)
    wrong = [(r.key, problem) for r in results for problem in (*r.problems, *worse(r, record, older))]
    wrong = [entry for entry in wrong if entry not in excused]
    if complete:
        wrong += [(key, "is recorded, but there is no such case") for key in stale(results, record)]
    for key, problem in wrong:
        console.print(f"{' '.join(key)}: {problem}", style="red", markup=False, soft_wrap=True)
    new = sum(result.key not in record for result in results)
    console.print(f"{len(results)} kernels, {len(wrong)} failures; {new} not recorded for Triton {version()}")
    return 1 if wrong or not results else 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three targets, the first case of each operation")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this target (may be repeated)")
    parser.add_argument("--case", help="only cases whose name contains this")
    parser.add_argument("--triton", metavar="VERSION", help="compile with this version of triton")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--record", action="store_true", help=f"write what was measured to {RECORD.name}")
    return parser.parse_args()


def with_triton(version: str) -> int:
    """Run this command with another version of triton, which is installed once, beside all else; its exit status."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "hf_kvcache", f"triton-{version}")
    if not (folder / "triton").is_dir():
        wanted = ["--no-deps", "--target", str(folder), f"triton=={version}"]
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)
    at = sys.argv.index("--triton") if "--triton" in sys.argv else None
    rest = sys.argv[1:] if at is None else sys.argv[1:at] + sys.argv[at + 2 :]
    rest = [argument for argument in rest if not argument.startswith("--triton=")]
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-m", "benchmarks.compile_report", *rest], env=environment).returncode


def selected(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """What to compile: operation, target, and index among the operation's cases."""
    return [
        (operation, target, index)
        for target in args.target or (QUICK_TARGETS if args.quick else TARGETS)
        for operation in machine_code.operations()
        for index, case in enumerate(machine_code.cases(operation, target))
        if (args.case or "") in case.name and not (args.quick and index)
    ]


def compiled(work: list[tuple[str, str, int]], jobs: int) -> list[Result]:
    """The results, in the order of ``work``."""
    # A fresh interpreter for each: a forked one would share the state of LLVM.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(build, *item) for item in work]
        for _ in track(as_completed(futures), "compiling", total=len(futures), transient=True):
            pass
        return [future.result() for future in futures]


def build(operation: str, target: str, index: int) -> Result:
    """Compile one case and judge it; what goes wrong is in the result."""
    case = machine_code.cases(operation, target)[index]
    try:
        made = machine_code.compile_case(case, target)
    except Exception as error:  # a compiler may fail in any way, and the other cases are still of interest
        return Result(target, case.name, None, case.num_warps, (_reason(error),))
    share = TARGETS[target].bandwidth_share(made.loop, case.num_warps, case.loop_bytes or 0)
    least = case.least_share if target == "sm90" else 0.0
    return Result(target, case.name, made, case.num_warps, tuple(problems(made, case, target)), share, least)


def problems(made: Compiled, case: machine_code.CompileCase, target: str) -> list[str]:
    """What is wrong with a compiled case by itself. Spills are waived on AMD's GPUs and for packing only."""
    limits, found = TARGETS[target], {}
    warps = limits.resident_warps(made.registers, made.shared, case.num_warps)
    if made.spills or made.stack:
        found[SPILLS] = f"{made.spills} spills, {made.stack} {_SPILLED}"
    if made.shared > limits.program_shared:
        found["shared memory"] = f"{made.shared} bytes of shared memory, {limits.program_shared} are to be had"
    if case.tensor_cores and not made.tensor:
        found["tensor cores"] = "no tensor-core instructions"
    if warps < LEAST_WARPS:
        found[WARPS] = f"{warps} resident warps, {LEAST_WARPS} {_FEW_WARPS}"
    waivable = {WARPS, SPILLS} if limits.amd or case.name.startswith("encode ") else {WARPS}
    needless = [f"{name} {_NEEDLESS}" for name in case.waived if name in waivable and name not in found]
    return [text for name, text in found.items() if name not in waivable & case.waived.keys()] + needless


def known(result: Result, record: Record, older: bool) -> list[str]:
    """The problems of a result that are no failures with an older Triton, where recorded.

    These are spills and few warps, and that neither is there where the newest Triton needs a waiver.
    """
    if not older or result.key not in record or result.compiled is None:
        return []
    return [problem for problem in result.problems if problem.endswith((_SPILLED, _FEW_WARPS, _NEEDLESS))]


def worse(result: Result, record: Record, older: bool = False) -> list[str]:
    """In what a result is worse than recorded; with an older Triton its share of the bandwidth does not count."""
    known = record.get(result.key)
    if known is None or result.compiled is None:
        return []
    slow = result.share is not None and result.share < result.least_share and not older
    found = [f"room for {result.share:.0%} of the bandwidth, {result.least_share:.0%} are wanted"] if slow else []
    return found + [
        f"{name}: {value}, recorded are {known[name]}"
        for name, value in vars(result.compiled).items()
        if not (name == "loop" and known[name] == 0)  # recorded before loops were counted, or a kernel without one
        and (value < known[name] if name in _MORE_IS_BETTER else value > known[name] * (1 + _MARGIN.get(name, 0) / 100))
    ]


def stale(results: list[Result], record: Record) -> list[tuple[str, str]]:
    """Recorded cases that are no more."""
    return sorted(record.keys() - {result.key for result in results})


def table(results: list[Result]) -> Table:
    """One row for each kernel and target."""
    made = Table(title=f"Triton {version()}, compiled without a GPU")
    for column in ("target", "case", *(name.replace("_", " ") for name in FIELDS), "warps / SM", "bound"):
        made.add_column(column, justify="left" if column in ("target", "case") else "right")
    for result in results:
        values = ["-"] * (len(FIELDS) + 2)
        if result.compiled is not None:
            held = TARGETS[result.target].resident_warps(
                result.compiled.registers, result.compiled.shared, result.warps
            )
            share = "-" if result.share is None else f"{min(result.share, 1):.0%}"
            values = [*map(str, (*vars(result.compiled).values(), held)), share]
        made.add_row(result.target, result.case, *values, style="red" if result.problems else None)
    return made


def _reason(error: BaseException) -> str:
    """The first of the errors that led to this one, in a line: what triton wraps around it only says where."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    # Triton's own errors begin with a place and end with the reason; between them stands the source.
    return f"{type(error).__name__}: " + (text if len(text) < 400 else f"{text[:80]} … {text[-300:]}")


if __name__ == "__main__":
    sys.exit(main())
