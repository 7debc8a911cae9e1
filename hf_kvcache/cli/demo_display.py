"""What the demo draws on the terminal: progress bars, the table of measurements, the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from transformers.generation.streamers import BaseStreamer

MIB = 2**20


@dataclass(frozen=True)
class Measurement:
    """What was measured of one cache: a row of the demo's table.

    Attributes:
        name: name of the cache.
        bytes_held: bytes that the cache holds after the answer.
        ratio: these bytes as a share of what a full cache in the same dtype would hold.
        bits_per_element: bits per packed element, scales included.
        tokens_per_second: speed of the answer.
        agreement: share of positions at which the most likely token is that of the full cache.
        kl: mean KL divergence from the full cache, in nats.
        text: the answer.
    """

    name: str
    bytes_held: int
    ratio: float
    bits_per_element: float
    tokens_per_second: float
    agreement: float
    kl: float
    text: str


class Bar(BaseStreamer):
    """The progress bar of a cache, which advances by one for each token. ``generate`` takes it as a streamer."""

    def __init__(self, progress: Progress, name: str) -> None:
        self.progress, self.name = progress, name
        self.task = progress.add_task(f"{name}: prefill", total=None)
        self.prompt_seen = False

    def start(self, stage: str, total: int) -> None:
        """Begin a stage of ``total`` tokens."""
        self.progress.update(self.task, description=f"{self.name}: {stage}", total=total, completed=0)

    def advance(self) -> None:
        """Count one token."""
        self.progress.advance(self.task)

    def put(self, value: torch.Tensor) -> None:
        # generate() passes the prompt first, in one call.
        if self.prompt_seen:
            self.advance()
        self.prompt_seen = True

    def end(self) -> None:
        # An answer may be shorter than its bar.
        self.progress.update(self.task, description=self.name, total=1, completed=1)


def progress_bars(console: Console) -> Progress:
    """The progress bars of all caches."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:24}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def build_table(rows: Sequence[Measurement]) -> Table:
    """The measurements as a table, one row a cache."""
    table = Table(
        title="Caches on the same prompt",
        caption="Agreement and KL: against the full cache, on its own answer, decoded through each cache.",
    )
    # With headings of two lines, seven columns fit a terminal of 80 characters.
    table.add_column("\ncache", no_wrap=True)
    for heading in (
        "held\nMiB",
        "\nratio",
        "bits per\nelement",
        "tokens\nper s",
        "top-1\nagrees",
        "mean KL\nnats",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.bytes_held / MIB:.2f}",
            f"{row.ratio:.3f}",
            f"{row.bits_per_element:.2f}",
            f"{row.tokens_per_second:.1f}",
            f"{row.agreement:.1%}",
            f"{row.kl:.5f}",
        )
    return table


def build_texts(question: str, rows: Sequence[Measurement]) -> Text:
    """The question and the answers; caches that gave the same answer share one entry."""
    names_by_text: dict[str, list[str]] = {}
    for row in rows:
        names_by_text.setdefault(row.text, []).append(row.name)
    out = Text(f"\n{question}\n", style="bold")
    for text, names in names_by_text.items():
        out.append(f"\n{', '.join(names)}\n", style="cyan not bold")
        out.append(f"{text}\n", style="not bold")
    return out
