"""compiled.csv: the figures of compiled kernels that the compile report compares with, by version of Triton."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from benchmarks.machine_code import FIELDS

RECORD = Path(__file__).with_name("compiled.csv")
#: Figures by target and case.
Record = dict[tuple[str, str], dict[str, int]]


def version() -> str:
    """The version of triton, on whose compilers all figures depend."""
    import triton

    return str(triton.__version__)


def read_record() -> Record:
    """What is recorded of this version of triton, by target and case."""
    return read_records().get(version(), {})


def read_records() -> dict[str, Record]:
    """What is recorded of each version of triton."""
    records: dict[str, Record] = {}
    if RECORD.exists():
        with RECORD.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                figures = {name: int(row[name]) for name in FIELDS}
                records.setdefault(row["triton"], {})[row["target"], row["case"]] = figures
    return records


def is_older() -> bool:
    """Whether a newer version of triton than this one is recorded."""
    return max([version(), *read_records()], key=_numbers) != version()


def write_record(found: Record, complete: bool) -> None:
    """Record what was found, in place of all else of this version of triton if it is complete."""
    records = read_records()
    records[version()] = found if complete else records.get(version(), {}) | found
    with RECORD.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["triton", "target", "case", *FIELDS])
        for triton, known in sorted(records.items(), key=lambda item: _numbers(item[0]), reverse=True):
            rows.writerows([triton, *key, *(known[key][name] for name in FIELDS)] for key in sorted(known))


def _numbers(version: str) -> tuple[int, ...]:
    """What versions are ordered by."""
    return tuple(map(int, re.findall(r"\d+", version)))
