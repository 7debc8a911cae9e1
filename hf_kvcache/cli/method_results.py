"""What was measured of each method: the tracked results of the evaluation, which are also in the documentation."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

#: Where the results are: in an installed package, and in a clone.
_FOLDERS = (Path(__file__).parent / "data" / "evaluation", Path(__file__).parents[2] / "docs" / "evaluation")
#: The measure that is shown: KL divergence to the full cache, nats a token.
_MEASURE = "kl"


@dataclass(frozen=True)
class Result:
    """One figure.

    Attributes:
        file: the file of results, in ``docs/evaluation``.
        task: the task, with the tokens of its context.
        cache: the cache as the evaluation names it.
        kl: KL divergence to the full cache, nats a token.
        stderr: its standard error.
    """

    file: str
    task: str
    cache: str
    kl: float
    stderr: float


def results(suite: str, pattern: str) -> list[Result]:
    """All KL divergences of one suite, of caches whose name matches ``pattern`` from its beginning to its end.

    The list is empty where the suite, or the whole folder of results, is not there.
    """
    return [result for result in _read(suite) if re.fullmatch(pattern, result.cache)]


@cache
def _read(suite: str) -> tuple[Result, ...]:
    path = next((folder / f"{suite}.csv" for folder in _FOLDERS if (folder / f"{suite}.csv").is_file()), None)
    if path is None:
        return ()
    found, cell = [], ("", "")
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            # A row of a cell stands before the rows of its figures.
            if row["kind"] == "cell":
                cell = row["task"], row["cache"]
            elif row["kind"] == "metric" and row["measure"] == _MEASURE:
                found.append(Result(path.name, *cell, float(row["value"]), float(row["stderr"] or 0)))
    return tuple(found)
