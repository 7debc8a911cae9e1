"""Step b: every case of ``cases.py``, by several processes, of which each goes on behind a case that lost its GPU."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from benchmarks.gpu.cases import Case, cases
from benchmarks.gpu.measuring import attempt
from benchmarks.gpu.results import FAILED, LEFT_OUT, Figures, Results, read
from benchmarks.gpu.settings import Settings, poisoned

#: Figure of a case that has begun; without others, the case has ended its process.
BEGUN, RIGHT = "begun", "right"


def run_part(settings: Settings, results: Results, worker: int, workers: int, done: set[str]) -> None:
    """Every ``workers``-th case that is not yet done."""
    torch.set_num_threads(1)
    with poisoned(settings):
        for case in cases(settings)[worker::workers]:
            if case.name in done:
                continue
            if settings.left() < 3:
                results.leave_out(case.name)
                continue
            results.add(case.name, "", **{BEGUN: True})
            attempt(settings, results, case.name, lambda case=case: check(case, results))  # type: ignore[misc]


def check(case: Case, results: Results) -> None:
    """Run a case and judge it."""
    begin = time.perf_counter()
    found = case.run()
    wrong = case.problems(found)
    text = f"WRONG {case.name}: {'; '.join(wrong)}" if wrong else ""
    results.add(case.name, text, seconds=time.perf_counter() - begin, **found, **{RIGHT: not wrong})


def collect(parts: list[Path], results: Results) -> list[str]:
    """Put what the processes found into one file; how it stands, in words."""
    found: dict[str, Figures] = {}
    for part in parts:
        found |= read(part)
    for case, figures in found.items():
        if figures.pop(BEGUN, False) and not figures:
            figures[FAILED] = "it never came back: a crash, or the time was up"
        results.add(case, "", **figures)
    return lines(found)


def lines(found: dict[str, Figures]) -> list[str]:
    """The results of this step in words."""
    wrong = {case: f for case, f in found.items() if not f.get(RIGHT) and LEFT_OUT not in f}
    missed = sum(LEFT_OUT in figures for figures in found.values())
    right = len(found) - len(wrong) - missed
    text = [f"correctness: {right} right, {len(wrong)} wrong, {missed} not reached"]
    for case, figures in list(wrong.items())[:40]:
        why = figures.get(FAILED) or ", ".join(f"{k} {v}" for k, v in figures.items() if k != "seconds")
        text.append(f"  WRONG {case}: {str(why)[:200]}")
    groups: dict[str, list[tuple[float, str]]] = {}
    for case, figures in found.items():
        if "relative error" in figures:
            dtype = next(word for word in case.split() if word in ("bf16", "fp16", "fp32"))
            groups.setdefault(f"{case.split()[0]} {dtype}", []).append((figures["relative error"], case))
    for name, errors in groups.items():
        text.append(f"  {name}: {len(errors)} cases, relative error {max(errors)[0]:.1e} at most ({max(errors)[1]})")
    slow = sorted(((f["seconds"], case) for case, f in found.items() if "seconds" in f), reverse=True)[:3]
    text.append("  slowest (mostly compiling): " + "; ".join(f"{case} {seconds:.1f} s" for seconds, case in slow))
    return text
