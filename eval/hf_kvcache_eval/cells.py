"""What is measured and kept: one cell is one cache on one task, and one JSON file.

A cell holds only what a second run with the same seed gives again. Seconds go into a file beside it.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass
class Metric:
    """One number of a cell.

    Attributes:
        value: the estimate.
        stderr: its standard error over samples; None where there is none.
        higher_is_better: which way is good.
        unit: ``"nats"``, ``"share"``, ...; for axes and tables.
        samples: the metric of each sample, in the order of the task's samples, for paired differences; may be empty.
    """

    value: float
    stderr: float | None = None
    higher_is_better: bool = True
    unit: str = ""
    samples: list[float] = field(default_factory=list)


@dataclass
class Series:
    """A curve of a cell: ``y`` and its standard errors over ``x``."""

    x: list[float]
    y: list[float]
    stderr: list[float]
    x_label: str
    y_label: str


@dataclass
class Memory:
    """What the cache held after the task's (last) prefill.

    Attributes:
        tokens: tokens seen, over all rows.
        bytes: bytes of its tensors, slack included.
        bytes_bf16: bytes that a bfloat16 DynamicCache would hold.
        bits_per_element: of what is packed, scales counted; None for caches that do not say it.
    """

    tokens: int
    bytes: int
    bytes_bf16: int
    bits_per_element: float | None = None

    @property
    def ratio_bf16(self) -> float:
        """Bytes over those of a bfloat16 DynamicCache."""
        return self.bytes / self.bytes_bf16


@dataclass
class Cell:
    """The result of one cache on one task.

    Attributes:
        cache: the cache spec's text.
        task: the task's name.
        status: ``"done"`` or ``"failed"``.
        error: what went wrong, one line; None if nothing did.
        metrics: by name; the task's headline metric is the first.
        series: curves by name.
        memory: bytes, where the task measures them.
        protocol: the settings that all caches share, and the task's own.
        model: name, dtype, parameters.
        versions: of the packages.
        machine: processor, threads, kernels.
        seed: of everything that is drawn.
        command: what reproduces the cell.
    """

    cache: str
    task: str
    status: str = "done"
    error: str | None = None
    metrics: dict[str, Metric] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    memory: Memory | None = None
    protocol: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    command: str = ""
    schema: int = SCHEMA

    @property
    def slug(self) -> str:
        """The cell's file name without its suffix."""
        return f"{slug(self.task)}__{slug(self.cache)}"

    def to_json(self) -> str:
        """The cell as JSON, keys in a fixed order; no NaN or infinity gets in."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Cell:
        """The cell that :meth:`to_json` wrote.

        Raises:
            ValueError: if it is none, or of another schema.
        """
        raw = json.loads(text)
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            raise ValueError(f"not a cell of schema {SCHEMA}")
        raw["metrics"] = {name: Metric(**metric) for name, metric in raw["metrics"].items()}
        raw["series"] = {name: Series(**series) for name, series in raw["series"].items()}
        raw["memory"] = None if raw["memory"] is None else Memory(**raw["memory"])
        return cls(**raw)


class Store:
    """The folder of one comparison: ``cells/*.json`` and ``timings/*.json``; ``pieces/*.json`` of unfinished cells.

    Args:
        folder: made where it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cells, self.timings, self.pieces = folder / "cells", folder / "timings", folder / "pieces"

    def write(self, cell: Cell, timing: dict[str, Any]) -> None:
        """Keep a cell; it appears whole or not at all."""
        write_file(self.timings / f"{cell.slug}.json", json.dumps(timing, indent=1) + "\n")
        write_file(self.cells / f"{cell.slug}.json", cell.to_json())
        if cell.status == "done":
            (self.pieces / f"{cell.slug}.json").unlink(missing_ok=True)

    def write_pieces(self, cell: Cell, pieces: list[dict[str, Any]]) -> None:
        """Keep the first pieces of a cell that is not finished; no NaN or infinity gets in."""
        text = json.dumps({"cell": asdict(cell), "pieces": pieces}, allow_nan=False)
        write_file(self.pieces / f"{cell.slug}.json", text + "\n")

    def read_pieces(self, cache: str, task: str) -> tuple[Cell, list[dict[str, Any]]] | None:
        """What :meth:`write_pieces` kept for a cache on a task; None if it is not there or cannot be read."""
        path = self.pieces / f"{Cell(cache, task).slug}.json"
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            return Cell.from_json(json.dumps(kept["cell"])), kept["pieces"]
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def read(self, cache: str, task: str) -> Cell | None:
        """The cell of a cache on a task; None if it is not there or cannot be read."""
        path = self.cells / f"{Cell(cache, task).slug}.json"
        try:
            return Cell.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def timing(self, cell: Cell) -> dict[str, Any]:
        """The times taken with a cell; empty if there are none."""
        path = self.timings / f"{cell.slug}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def slug(text: str) -> str:
    """``text`` as a part of a file name."""
    return re.sub(r"[^\w@.=+-]", "_", text)


def write_file(path: Path, text: str) -> None:
    """Write a file, and its folder where it is missing; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".tmp{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
