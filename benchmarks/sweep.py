"""One measurement after the other, for every shape and number of tokens of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from rich.console import Console
from rich.progress import Progress

from benchmarks.methods import Shape
from benchmarks.session import Report, Row
from benchmarks.tables import show


def sweep(
    args: argparse.Namespace, console: Console, report: Report, measure: Callable[[Shape, int], list[Row]]
) -> None:
    """Measure with a progress bar, and show and report the rows of one shape after the other.

    Args:
        args: with ``shapes`` and ``tokens``.
        console: shows the tables.
        report: is given the rows.
        measure: the rows of a shape and a number of tokens.
    """
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(report.script, total=len(args.shapes) * len(args.tokens))
        for shape in map(Shape.parse, args.shapes):
            rows: list[Row] = []
            for count in args.tokens:
                rows += measure(shape, count)
                progress.advance(task)
            show(report.script, rows, console)
            report.rows += rows
