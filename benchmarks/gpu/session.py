"""The steps one after the other, each in processes of its own that are stopped when their time is up."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import correctness, summary
from benchmarks.gpu.results import Results

ROOT = Path(__file__).parents[2]
STEPS = {"a": "environment", "b": "correctness", "c": "synchronization", "d": "layer", "e": "model", "f": "tests"}
#: Seconds that each step may take, and those that are then kept for the steps behind it.
LIMITS = {"a": (45, 0), "b": (150, 0), "c": (25, 0), "d": (170, 120), "e": (110, 55), "f": (110, 8)}
#: Seconds that a process gets to end by itself, and then between being asked to and being killed.
_GRACE, _UNTIL_KILLED = 5, 5
#: How often a worker goes on behind a case that ended its process.
_TRIES = 4
#: Status of a process that was stopped.
STOPPED = 124
#: Tests of the Triton kernels that cannot run on a GPU: they take tensors of the CPU, or compile.
_CPU_TESTS = ("test_cases.py", "test_compile_report.py", "test_column_sums.py", "test_pages_alone.py")


def default_folder() -> Path:
    """Where results go: a machine that runs this from afar names a folder in OUT."""
    return Path(os.environ.get("OUT") or "results/gpu")


class Session:
    """One run of the check.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.began = time.monotonic()
        self.out: Path = args.out
        self.failed = self.over = False
        self._running: set[subprocess.Popen[Any]] = set()
        self._lock = threading.Lock()

    def run(self) -> int:
        """Run the steps; exit status 1 if something was wrong or did not run."""
        self.out.mkdir(parents=True, exist_ok=True)
        wanted = [STEPS[step] for step in self.args.steps] + (["generation"] if "b" in self.args.steps else [])
        for name in (*wanted, "log"):
            for ending in ("csv", "txt"):
                (self.out / f"{name}.{ending}").unlink(missing_ok=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.interrupted)
        with tempfile.TemporaryDirectory() as work:
            self.work = Path(work)
            self.environment = environment(self.work, self.args)
            actions: dict[str, Callable[[float], None]] = {"b": self.correctness, "f": self.tests}
            try:
                for step in STEPS:
                    if step in self.args.steps:
                        most, reserved = LIMITS[step]
                        limit = min(most, self.left() - reserved)
                        self.say(f"{step}: {STEPS[step]}, {limit:.0f} s at most")
                        actions.get(step, partial(self.part, STEPS[step]))(limit)
            finally:
                self.stop_all()
                wrong = summary.write(self.out, self.print)
        self.say("done")
        return int(self.failed or wrong)

    def left(self) -> float:
        return self.args.total - (time.monotonic() - self.began)

    def say(self, text: str) -> None:
        self.print(f"--- [{time.monotonic() - self.began:.0f} s] {text}")

    def print(self, text: str) -> None:
        """Print, and into the log."""
        with self._lock:
            print(text, flush=True)
            with (self.out / "log.txt").open("a", encoding="utf-8") as log:
                log.write(text + "\n")

    def part(self, name: str, limit: float) -> None:
        """One step in a process of its own."""
        self.execute(self.command(name, self.out / f"{name}.csv", limit), limit, self.print)

    def command(self, name: str, path: Path, limit: float, *more: str) -> list[str]:
        args = self.args
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--part-file", str(path)]
        command += ["--part-seconds", str(limit - _GRACE), "--device", args.device, "--out", str(self.out), *more]
        command += ["--tiny"] if args.tiny else []
        return command + ([f"--only={args.only}"] if args.only else [])

    def correctness(self, limit: float) -> None:
        """Step b: the workers, and the end-to-end checks beside them."""
        count = self.args.workers or max(1, (os.cpu_count() or 1) - 2)
        parts = [self.work / f"{number}.csv" for number in range(count)]
        said: Counter[str] = Counter()
        try:
            with ThreadPoolExecutor(count + 1) as pool:
                futures = [pool.submit(self.worker, n, count, parts[n], limit, said) for n in range(count)]
                futures.append(pool.submit(self.part, "generation", limit))
                for future in futures:
                    future.result()
        finally:
            results = Results(self.out / "correctness.csv", "correctness")
            for line in correctness.collect(parts, results):
                self.print(line)
            results.close()
        for line, times in said.most_common(12):
            self.print(f"  {times} x {line[:240]}")

    def worker(self, number: int, count: int, path: Path, limit: float, said: Counter[str]) -> None:
        """One worker, again behind a case that ended it."""
        end = time.monotonic() + limit

        def take(line: str) -> None:
            if line.startswith(("WRONG", "FAILED")):
                self.print(line[:300])
            else:
                said[line] += 1

        for _ in range(_TRIES):
            left = end - time.monotonic()
            command = self.command("correctness", path, left, "--part-worker", str(number), str(count))
            if self.execute(command, left, take) in (0, STOPPED, None):
                return

    def tests(self, limit: float) -> None:
        """Step f."""
        if importlib.util.find_spec("pytest") is None:
            self.say("pytest is not installed: left out")
            return
        folder = "tests/kernels/triton"
        command = [sys.executable, "-m", "pytest", folder, "-q", "-W", "ignore", "-p", "no:cacheprovider"]
        command += [
            "-m",
            "not slow",
            "--tb=line",
            "--maxfail=60",
            *(f"--ignore={folder}/{name}" for name in _CPU_TESTS),
        ]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(self.args.workers or max(1, (os.cpu_count() or 1) - 2))]
        interpreted = {"TRITON_INTERPRET": "1" if self.args.device == "cpu" else "0", "HF_KVCACHE_BACKEND": ""}
        with (self.out / "tests.txt").open("w", encoding="utf-8") as file:

            def take(line: str) -> None:
                file.write(line + "\n")
                file.flush()
                if line.startswith(("FAILED", "ERROR", "E  ")) or " passed" in line or " failed" in line:
                    self.print(line[:240])

            self.execute(command, limit, take, interpreted)

    def execute(
        self, command: list[str], limit: float, take: Callable[[str], None], more: dict[str, str] | None = None
    ) -> int | None:
        """Run a command for at most ``limit`` seconds, each line it prints going to ``take``.

        Returns:
            Its status, ``STOPPED`` if it was stopped, or None if there was no time to begin.
        """
        if self.over or limit < 2 * _GRACE:
            self.say(f"no time for {' '.join(command[2:6])}")
            self.failed = True
            return None
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment | (more or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._running.add(process)
        reader = threading.Thread(target=_read_lines, args=(process, take), daemon=True)
        reader.start()
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            stop(process)
            status = STOPPED
        self._running.discard(process)
        reader.join(_GRACE)
        if status:
            self.say(f"status {status}: {' '.join(command[2:6])}")
            self.failed = True
        return status

    def interrupted(self, number: int, frame: Any) -> None:
        """Stop everything, write what there is, and end."""
        self.over = True
        self.stop_all()
        sys.exit(128 + number)

    def stop_all(self) -> None:
        for process in list(self._running):
            stop(process)


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process that this program started, with its children: first asked, then killed."""
    for number, seconds in ((signal.SIGTERM, _UNTIL_KILLED), (signal.SIGKILL, _UNTIL_KILLED)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            pass


def _read_lines(process: subprocess.Popen[str], take: Callable[[str], None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        take(line.rstrip("\n"))


def environment(work: Path, args: argparse.Namespace) -> dict[str, str]:
    """The environment of the processes: the checkout on the path, nothing from a network, a cache for this run."""
    before = os.environ.get("PYTHONPATH")
    changed = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval"), *([before] if before else [])]),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR") or str(work / "triton"),
    }
    if args.interpreter:
        changed |= {"TRITON_INTERPRET": "1", "HF_KVCACHE_BACKEND": "triton"}
    return os.environ | changed
