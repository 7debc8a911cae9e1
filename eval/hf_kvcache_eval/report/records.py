"""A comparison as one CSV file, from which its report can be made again.

A row is a measure of a cell, or one of these: ``setup`` (what several cells share: model, machine, versions, protocol,
seed, date), ``cell`` (that there is one, and of which setup), ``unreadable`` (a file that is no cell). A list of
numbers has spaces between them. Samples are kept only of the metrics that the report compares sample by sample.
"""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_kvcache_eval.cells import Cell, Memory, Metric, Series
from hf_kvcache_eval.report.load import FIDELITY, Comparison
from hf_kvcache_eval.report.names import TaskName

COLUMNS = ("kind", "setup", "task", "cache", "measure", "value", "stderr", "unit", "better", "x", "samples", "note")
#: What of a file of times the report shows; the date and commit of the recording go into the setup.
_TIMES = ("decode_ms", "decode_ms_per_token", "prefill_seconds")
RECORDED = ("date", "commit")
#: Metrics besides the headline metric whose differences are taken sample by sample.
_COMPARED = ("kl", "delta_nll")
#: Keys of a protocol that differ between the caches of one task.
_OWN = ("compressed_share", "single_pass")
Row = dict[str, str]


def write_csv(found: Comparison, path: Path) -> None:
    """Write every figure of the comparison that its report needs."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(_rows(found))


def read_csv(path: Path) -> Comparison:
    """The comparison that :func:`write_csv` wrote.

    Raises:
        ValueError: if the file is none of these, or has no cells.
    """
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        if tuple(table.fieldnames or ()) != COLUMNS:
            raise ValueError(f"path={str(path)!r} has not the columns {', '.join(COLUMNS)}")
        found = _Reader().read(table)
    if not found.cells:
        raise ValueError(f"path={str(path)!r} has no cells")
    return found


def _rows(found: Comparison) -> Iterator[Row]:
    setups: dict[str, str] = {}
    described = {id(cell): _setup(cell, found) for cell in found.cells}
    for cell in found.cells:
        text = described[id(cell)]
        if text not in setups:
            setups[text] = str(len(setups) + 1)
            yield {"kind": "setup", "setup": setups[text], "note": text}
    for cell in found.cells:
        for row in _cell_rows(cell, found):
            yield {"setup": setups[described[id(cell)]], "task": cell.task, "cache": cell.cache} | row
    for name in found.unreadable:
        yield {"kind": "unreadable", "note": name}


def _setup(cell: Cell, found: Comparison) -> str:
    """What a cell shares with others, as JSON."""
    words = {shlex.quote(cell.cache): "{cache}", shlex.quote(cell.task): "{task}"}
    times = found.timings.get((cell.cache, cell.task), {})
    shared = {
        "model": cell.model,
        "machine": cell.machine,
        "versions": cell.versions,
        "protocol": {name: value for name, value in cell.protocol.items() if name not in _OWN},
        "seed": cell.seed,
        "command": " ".join(words.get(word, word) for word in cell.command.split(" ")),
    }
    return json.dumps(shared | {name: times[name] for name in RECORDED if name in times}, ensure_ascii=False)


def _cell_rows(cell: Cell, found: Comparison) -> Iterator[Row]:
    own = {name: cell.protocol[name] for name in _OWN if name in cell.protocol}
    yield {"kind": "cell", "measure": cell.status, "note": cell.error or (json.dumps(own) if own else "")}
    base, headline = TaskName.of(cell.task).base, next(iter(cell.metrics), None)
    for name, metric in cell.metrics.items():
        compared = name == headline or (base == FIDELITY and name in _COMPARED)
        yield {
            "kind": "metric",
            "measure": name,
            "value": _text(metric.value),
            "stderr": "" if metric.stderr is None else f"{metric.stderr:.5g}",
            "unit": metric.unit,
            "better": "higher" if metric.higher_is_better else "lower",
            "samples": _text(metric.samples) if compared else "",
        }
    for name, series in cell.series.items():
        lists = {"x": series.x, "value": series.y, "stderr": series.stderr}
        row = {column: " ".join(f"{value:.6g}" for value in values) for column, values in lists.items()}
        yield {"kind": "series", "measure": name, "unit": series.y_label, "note": series.x_label} | row
    for name, size in vars(cell.memory).items() if cell.memory else ():
        yield {"kind": "memory", "measure": name, "value": _text(size)}
    times = found.timings.get((cell.cache, cell.task), {})
    for name in _TIMES:
        taken = times.get(name, [])
        numbers = [x for x in (taken if isinstance(taken, list) else [taken]) if isinstance(x, int | float)]
        if numbers:
            yield {"kind": "time", "measure": name, "value": _text(numbers)}


class _Reader:
    """Builds the cells of a comparison from its rows."""

    def __init__(self) -> None:
        self.setups: dict[str, dict[str, Any]] = {}
        self.found = Comparison()

    def read(self, rows: Iterator[Row] | csv.DictReader[str]) -> Comparison:
        """The comparison of all ``rows``."""
        cell = Cell("", "")
        for row in rows:
            match row["kind"]:
                case "setup":
                    self.setups[row["setup"]] = json.loads(row["note"])
                case "unreadable":
                    self.found.unreadable.append(row["note"])
                case "cell":
                    cell = self._cell(row)
                case _:
                    self._measure(cell, row)
        return self.found

    def _cell(self, row: Row) -> Cell:
        setup = dict(self.setups[row["setup"]])
        recorded = {name: setup.pop(name) for name in RECORDED if name in setup}
        words = {"{cache}": shlex.quote(row["cache"]), "{task}": shlex.quote(row["task"])}
        setup["command"] = " ".join(words.get(word, word) for word in setup["command"].split(" "))
        cell = Cell(row["cache"], row["task"], row["measure"], **setup)
        if cell.status == "done":
            cell.protocol = cell.protocol | (json.loads(row["note"]) if row["note"] else {})
            self.found.done[cell.cache, cell.task] = cell
            self.found.timings[cell.cache, cell.task] = recorded
        else:
            cell.error = row["note"] or None
            self.found.failed.append(cell)
        return cell

    def _measure(self, cell: Cell, row: Row) -> None:
        name, value, stderr = row["measure"], _numbers(row["value"]), _numbers(row["stderr"])
        match row["kind"]:
            case "metric":
                error = stderr[0] if stderr else None
                higher = row["better"] == "higher"
                cell.metrics[name] = Metric(value[0], error, higher, row["unit"], _numbers(row["samples"]))
            case "series":
                cell.series[name] = Series(_numbers(row["x"]), value, stderr, row["note"], row["unit"])
            case "memory":
                cell.memory = cell.memory or Memory(0, 0, 0)
                setattr(cell.memory, name, (value[0] if value else None) if "bits" in name else int(value[0]))
            case "time":
                self.found.timings[cell.cache, cell.task][name] = value if len(value) > 1 else value[0]
            case kind:
                raise ValueError(f"kind={kind!r} of a row is not known")


def _text(value: float | list[float] | None) -> str:
    """Nine digits of a number, and of each in a list, with spaces between them."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(f"{number:.9g}" for number in value)
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:.9g}"


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]
