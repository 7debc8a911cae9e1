"""Everything on one page, and in one file with the card, the driver and the versions."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu import correctness, generation, synchronization
from benchmarks.gpu.environment import CEILINGS, COSTS, MACHINE
from benchmarks.gpu.results import FAILED, FIELDS, LEFT_OUT, Figures, parsed, read, short

STEPS = ("environment", "correctness", "generation", "synchronization", "layer", "model")
#: What is printed of a machine, and in one line of a measurement.
_MACHINE = ("card", "driver", "torch", "triton", "transformers", "decode", "triton kernels", "native kernels")
_SHOWN = {
    "eager us": "{} us eager",
    "cpu us": "{} cpu",
    "gpu us": "{} gpu",
    "share of copy": "{:.0%} of copy",
    "times dynamic": "x{:.2f}",
    "error": "error {:.0e}",
    "ms": "{} ms",
    "kernels": "{} kernels",
    "ms a token": "{} ms a token",
    "cpu ms": "{} cpu",
    "gpu busy ms": "{} GPU busy",
    "kernels a step": "{} kernels",
    "ordinary us": "{} us ordinary",
    "slowest us": "{} us slowest",
}
#: Cases of a layer of which only the best of each codec is printed, and cases that are not printed: more query heads,
#: projections.
_LAUNCHES = re.compile(r"launch (T=\d+ \S+) (.*)")
_UNPRINTED = re.compile(r".* Hq=(8|64) .*|latents .*(absorb|expand)")


def write(folder: Path, say: Callable[[str], None]) -> bool:
    """Print the page and write the file; whether something was wrong."""
    found = {step: read(folder / f"{step}.csv") for step in STEPS}
    say("=" * 30 + " SUMMARY " + "=" * 30)
    for line in page(found):
        say(line)
    tests = folder / "tests.txt"
    if tests.exists():
        say("tests: " + (tests.read_text(encoding="utf-8").strip().splitlines() or ["no output"])[-1])
    say(f"wrote {write_card(folder, found['environment'].get(MACHINE, {}))}")
    judged = [figures for step in ("correctness", "generation") for figures in found[step].values()]
    failed = any(FAILED in figures for step in found.values() for figures in step.values())
    return failed or any(not figures.get("right", True) for figures in judged)


def page(found: dict[str, dict[str, Figures]]) -> list[str]:
    """The lines of the page."""
    machine = found["environment"].get(MACHINE, {})
    lines = ["; ".join(f"{name} {short(machine[name])}" for name in _MACHINE if name in machine)]
    for case, figures in found["environment"].items():
        if case in (CEILINGS, COSTS) or case.startswith("upload"):
            lines.append(f"{case}: " + ", ".join(f"{name} {short(value)}" for name, value in figures.items()))
    lines += correctness.lines(found["correctness"]) if found["correctness"] else []
    lines += generation.lines(found["generation"]) if found["generation"] else []
    lines += synchronization.lines(found["synchronization"]) if found["synchronization"] else []
    for step in ("layer", "model"):
        if found[step]:
            lines += [f"{step}:", *(f"  {line}" for line in measured(found[step]))]
    return lines


def measured(found: dict[str, Figures]) -> list[str]:
    """A line for each measurement, and for launch configurations one for each codec."""
    lines: list[str] = []
    tried: dict[str, dict[str, float]] = {}
    for case, figures in found.items():
        if FAILED in figures or LEFT_OUT in figures:
            why = f"FAILED: {figures[FAILED]}" if FAILED in figures else f"left out: {figures[LEFT_OUT]}"
            lines.append(f"{case}: {why}"[:200])
        elif match := _LAUNCHES.fullmatch(case):
            tried.setdefault(match.group(1), {})[match.group(2)] = figures["gpu us"]
        elif _UNPRINTED.fullmatch(case):
            continue
        else:
            shown = [text.format(_number(figures[name], text)) for name, text in _SHOWN.items() if name in figures]
            lines.append(f"{case}: " + ", ".join(shown) + (" WAITS" if figures.get("cpu waits") is True else ""))
    for codec, times in tried.items():
        best = min(times, key=lambda name: times[name])
        usual = short(times.get("as it is", float("nan")))
        lines.append(f"launch {codec}: as it is {usual} us, best {short(times[best])} ({best})")
    return lines


def _number(value: object, text: str) -> object:
    """A value for a text that does not say how it is to be written."""
    return f"{value:,.4g}" if "{}" in text and isinstance(value, float) else value


def is_detail(step: str, figure: str) -> bool:
    """Whether a figure stays in the file of its step."""
    judged = ("relative error", "right", FAILED, LEFT_OUT)
    return figure.startswith("kernel ") or (step == "correctness" and figure not in judged)


def write_card(folder: Path, machine: Figures) -> Path:
    """The file with the figures of a card."""
    card = re.sub(r"[^a-z0-9]+", "_", str(machine.get("card", "unknown")).lower()).strip("_")
    path = folder / f"gpu_{card}.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(FIELDS)
        for step in STEPS:
            if not (folder / f"{step}.csv").exists():
                continue
            with (folder / f"{step}.csv").open(encoding="utf-8", newline="") as own:
                for row in csv.DictReader(own):
                    if not is_detail(step, row["figure"]):
                        value = parsed(row["value"])
                        number = isinstance(value, float)
                        rows.writerow([*list(row.values())[:3], f"{value:.4g}" if number else row["value"]])
    return path
