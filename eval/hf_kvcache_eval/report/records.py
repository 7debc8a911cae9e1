"""A comparison as one CSV file, from which its report can be made again.

A row is one of these:

- ``setup``: what several cells share (model, machine, versions, protocol, seed, date), as JSON. What is the same as in
  the setup before is left out; null stands for what that one has and this one has not.
- ``about metric``, ``about series``: units and the direction of all rows below of that kind and name; a series' x.
- ``cell``: that there is one, and of which setup. Its value is the share of the prefilled tokens that was compressed.
- ``metric``, ``series``, ``time``: a measure of a cell.
- ``memory``: tokens, bytes, bytes of a bfloat16 cache and, if the cache tells them, bits per element.
- ``unreadable``: a file that is no cell.

A list of numbers has spaces between them. Samples are kept only of the metrics that the report compares sample by
sample, and of ``same_tokens``. Rows end with their last field that is not empty.
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

COLUMNS = ("kind", "setup", "task", "cache", "measure", "value", "stderr", "samples", "note", "unit", "better", "x")
#: What of a file of times the report shows; the date and commit of the recording go into the setup.
_TIMES = ("decode_ms", "decode_ms_per_token", "prefill_seconds", "compress_seconds")
RECORDED = ("date", "commit")
#: Metrics besides the headline metric whose samples are kept, by tasks: what a table compares sample by sample, and of
#: *drift* the tokens that are the same, of which the median alone says little.
_KEPT = {FIDELITY: ("kl", "delta_nll", "top1", "read"), "drift": ("same_tokens",)}
#: Keys of a protocol that differ between the caches of one task, and how a row says the second.
_SHARE, _PASS = "compressed_share", "single_pass"
_PASSES: dict[Any, str] = {True: "single pass", False: "several passes"}
Row = dict[str, str]


def write_csv(found: Comparison, path: Path) -> None:
    """Write every figure of the comparison that its report needs."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for row in _rows(found):
            used = max(index for index, name in enumerate(COLUMNS, 1) if row.get(name))
            table.writerow([row.get(name, "") for name in COLUMNS[:used]])


def read_csv(path: Path) -> Comparison:
    """The comparison that :func:`write_csv` wrote.

    Raises:
        ValueError: if the file is none of these, or has no cells.
    """
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file, restval="")
        if tuple(table.fieldnames or ()) != COLUMNS:
            raise ValueError(f"path={str(path)!r} has not the columns {', '.join(COLUMNS)}")
        found = _Reader().read(table)
    if not found.cells:
        raise ValueError(f"path={str(path)!r} has no cells")
    return found


def _rows(found: Comparison) -> Iterator[Row]:
    setups: dict[str, str] = {}
    described = {id(cell): json.dumps(_setup(cell, found)) for cell in found.cells}
    before: dict[str, Any] = {}
    for text in dict.fromkeys(described.values()):
        setups[text] = str(len(setups) + 1)
        setup = json.loads(text)
        changes = {name: setup.get(name) for name in {**setup, **before} if setup.get(name) != before.get(name)}
        yield {"kind": "setup", "setup": setups[text], "note": json.dumps(changes, ensure_ascii=False)}
        before = setup
    told: dict[tuple[str, str], Row] = {}
    for cell in found.cells:
        for row in _about(cell):
            if told.get((row["kind"], row["measure"])) != row:
                told[row["kind"], row["measure"]] = row
                yield row
        for row in _cell_rows(cell, found):
            # The rows of a cell follow it.
            own = {"setup": setups[described[id(cell)]], "task": cell.task, "cache": cell.cache}
            yield (own if row["kind"] == "cell" else {}) | row
    for name in found.unreadable:
        yield {"kind": "unreadable", "note": name}


def _setup(cell: Cell, found: Comparison) -> dict[str, Any]:
    """What a cell shares with others."""
    words = {shlex.quote(cell.cache): "{cache}", shlex.quote(cell.task): "{task}"}
    times = found.timings.get((cell.cache, cell.task), {})
    shared = {
        "model": cell.model,
        "machine": cell.machine,
        "versions": cell.versions,
        "protocol": {name: value for name, value in cell.protocol.items() if name not in (_SHARE, _PASS)},
        "seed": cell.seed,
        "command": " ".join(words.get(word, word) for word in cell.command.split(" ")),
    }
    return shared | {name: times[name] for name in RECORDED if name in times}


def _about(cell: Cell) -> Iterator[Row]:
    """What the metrics and series of a cell are: usually the same for all caches."""
    for name, metric in cell.metrics.items():
        better = "higher" if metric.higher_is_better else "lower"
        yield {"kind": "about metric", "measure": name, "unit": metric.unit, "better": better}
    for name, series in cell.series.items():
        labels = {"note": series.x_label, "unit": series.y_label}
        yield {"kind": "about series", "measure": name, "x": _short(series.x)} | labels


def _cell_rows(cell: Cell, found: Comparison) -> Iterator[Row]:
    share = cell.protocol.get(_SHARE)
    passes = _PASSES.get(cell.protocol.get(_PASS), "")
    yield {"kind": "cell", "measure": cell.status, "value": _text(share), "note": cell.error or passes}
    base, headline = TaskName.of(cell.task).base, next(iter(cell.metrics), None)
    for name, metric in cell.metrics.items():
        kept = name == headline or name in _KEPT.get(base, ())
        yield {
            "kind": "metric",
            "measure": name,
            "value": _text(metric.value),
            "stderr": "" if metric.stderr is None else f"{metric.stderr:.5g}",
            "samples": _text(metric.samples) if kept else "",
        }
    for name, series in cell.series.items():
        yield {"kind": "series", "measure": name, "value": _short(series.y), "stderr": _short(series.stderr)}
    if cell.memory:
        yield {"kind": "memory", "value": _text([size for size in vars(cell.memory).values() if size is not None])}
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
        self.setup: dict[str, Any] = {}
        self.about: dict[tuple[str, str], Row] = {}
        self.found = Comparison()

    def read(self, rows: Iterator[Row] | csv.DictReader[str]) -> Comparison:
        """The comparison of all ``rows``."""
        cell = Cell("", "")
        for row in rows:
            match row["kind"]:
                case "setup":
                    changed = self.setup | json.loads(row["note"])
                    self.setup = {name: value for name, value in changed.items() if value is not None}
                    self.setups[row["setup"]] = self.setup
                case "about metric" | "about series":
                    self.about[row["kind"], row["measure"]] = row
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
        if row["value"]:
            cell.protocol = cell.protocol | {_SHARE: float(row["value"])}
        if cell.status == "done":
            if row["note"]:
                cell.protocol = cell.protocol | {_PASS: row["note"] == _PASSES[True]}
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
                about = self.about["about metric", name]
                error = stderr[0] if stderr else None
                higher = about["better"] == "higher"
                cell.metrics[name] = Metric(value[0], error, higher, about["unit"], _numbers(row["samples"]))
            case "series":
                about = self.about["about series", name]
                cell.series[name] = Series(_numbers(about["x"]), value, stderr, about["note"], about["unit"])
            case "memory":
                tokens, size, size_bf16, *bits = value
                cell.memory = Memory(int(tokens), int(size), int(size_bf16), *bits)
            case "time":
                self.found.timings[cell.cache, cell.task][name] = value if len(value) > 1 else value[0]
            case kind:
                raise ValueError(f"kind={kind!r} of a row is not known")


def _text(value: float | list[float] | None) -> str:
    """Nine digits of a number, all of an integer; of each in a list, with spaces between them."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(_text(number) for number in value)
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:.9g}"


def _short(values: list[float]) -> str:
    """Six digits of each number of a curve."""
    return " ".join(f"{value:.6g}" for value in values)


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]
