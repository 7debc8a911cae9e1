"""Results on disk as soon as they are known: CSV files with one figure in a row, ``step,case,figure,value``."""

from __future__ import annotations

import csv
import os
import traceback
from pathlib import Path
from typing import Any

FIELDS = ("step", "case", "figure", "value")
#: Figures that a case may have in place of numbers: why it failed, and why it did not run.
FAILED, LEFT_OUT = "failed", "left out"
Figures = dict[str, Any]


class Results:
    """The results of one step, appended to a file row by row.

    Args:
        path: of the file.
        step: what stands in the first column.
    """

    def __init__(self, path: Path, step: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.step = step
        new = not path.exists() or path.stat().st_size == 0
        self._file = path.open("a", encoding="utf-8", newline="")
        self._rows = csv.writer(self._file, lineterminator="\n")
        if new:
            self._rows.writerow(FIELDS)

    def add(self, case: str, text: str | None = None, **figures: Any) -> None:
        """Write the figures of a case, and print ``text``, by default the case and its figures; nothing with ""."""
        figures = {name.replace("_", " "): value for name, value in figures.items() if value is not None}
        self._rows.writerows([self.step, case, figure, written(value)] for figure, value in figures.items())
        self._file.flush()
        os.fsync(self._file.fileno())
        if text is None:
            text = f"{case}: " + ", ".join(f"{figure} {short(value)}" for figure, value in figures.items())
        if text:
            print(text, flush=True)

    def fail(self, case: str, error: BaseException) -> None:
        """Take note of an exception that ended a case."""
        self.add(case, f"FAILED {case}: {reason(error)}", **{FAILED: reason(error)})

    def leave_out(self, case: str, why: str = "no time") -> None:
        """Take note of a case that did not run."""
        self.add(case, f"left out: {case}: {why}", **{LEFT_OUT: why})

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> dict[str, Figures]:
    """The figures of each case of a file; of two values, the later one."""
    found: dict[str, Figures] = {}
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault(row["case"], {})[row["figure"]] = parsed(row["value"] or "")
    return found


def written(value: Any) -> str:
    """A value as it stands in a file."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def short(value: Any) -> str:
    """A value as it is printed."""
    return f"{value:.3g}" if isinstance(value, float) else written(value)


def parsed(text: str) -> Any:
    """What :func:`written` made a text of."""
    if text in ("yes", "no"):
        return text == "yes"
    try:
        return float(text)
    except ValueError:
        return text


def reason(error: BaseException, most: int = 500) -> str:
    """An exception in one line, with the last place of the package that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "hf_kvcache" in f.filename]
    place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    while error.__cause__ is not None:  # what triton wraps around an error only says where
        error = error.__cause__
    text = " ".join(str(error).split())
    text = text if len(text) <= most else f"{text[: most // 4]} … {text[-most * 3 // 4 :]}"
    return f"{type(error).__name__}{place}: {text}"
