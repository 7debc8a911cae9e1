"""How far a comparison has come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """A bar over all cells that moves within them, with the time left."""

    def __init__(self, progress: Progress, cells: int) -> None:
        self._progress, self._task = progress, progress.add_task("", total=cells)
        self._finished, self._cells = 0, 1

    def start(self, what: str, cells: int = 1, share: float = 0.0) -> None:
        """Say what is measured now, of which ``share`` is done: ``cells`` that will be finished together."""
        self._cells = cells
        self._progress.update(self._task, description=what, completed=self._finished + share * cells)

    def advance(self, share: float) -> None:
        """Say that ``share`` of it is done, if it is one cell."""
        if self._cells == 1:
            self._progress.update(self._task, completed=self._finished + min(share, 1.0))

    def finish(self, cells: int = 1) -> None:
        """Say that so many cells are finished."""
        self._finished += cells
        self._progress.update(self._task, completed=self._finished)


@contextmanager
def shown(console: Console, cells: int) -> Iterator[Bar]:
    """A bar over so many cells, as long as the context lasts."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        yield Bar(progress, cells)
