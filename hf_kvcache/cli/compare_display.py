"""What ``hf-kvcache compare`` draws on a terminal: a progress bar with the time that is left, and the table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from hf_kvcache.cli.compare_measure import Advance, Compared
from hf_kvcache.cli.compare_page import CAPTION, COLUMNS
from hf_kvcache.cli.reading import check_folder, check_matplotlib, check_picture

#: A token that is read with many others takes about this share of the time of one that is decoded alone.
_READ_AT_ONCE = 1 / 16


@contextmanager
def progress(windows: torch.Tensor, prefix: int, caches: int) -> Iterator[Advance]:
    """A progress bar on stderr over all ``caches`` and ``windows [n, T]``; gives the function that moves it."""
    suffix = windows.shape[1] - prefix
    columns = (SpinnerColumn(), TextColumn("{task.description:20}"), BarColumn(), TaskProgressColumn())
    # Speed is taken over the last ten minutes, since reading and decoding go at different ones.
    bar = Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True, speed_estimate_period=600
    )
    with bar:
        task = bar.add_task("", total=len(windows) * caches * (suffix + prefix * _READ_AT_ONCE))

        def advance(name: str, tokens: int) -> None:
            bar.update(task, description=name, advance=tokens if tokens <= 1 else tokens * _READ_AT_ONCE)

        yield advance


def show(rows: Sequence[Compared], facts: dict[str, Any]) -> None:
    """Print the table."""
    lengths = f"{facts['suffix']} tokens behind {facts['prefix']:,}"
    windows = " or ".join(str(count) for count in sorted({row.windows for row in rows}))
    title = f"{facts['model']}, {facts['dtype']}, {facts['text']}: {lengths}, {windows} of {facts['windows']} windows"
    table = Table(title=title, caption=CAPTION)
    columns = [column for column in COLUMNS if not column.wide]
    for index, column in enumerate(columns):
        table.add_column(column.heading, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(column.cell(row) for column in columns))
    Console(highlight=False).print(table)


def check_files(plot: str | None, html: str | None) -> None:
    """Raise before anything is measured if a file could not be written."""
    if plot is not None:
        check_picture("plot", plot)
    if html is not None:
        check_folder("html", html)
        check_matplotlib("html")
