"""What ``hf-kvcache explain`` draws: a progress bar, a table, and the curves as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from hf_kvcache.cli.explain_timing import NO_CACHE, Measured

_CAPTION = (
    "Medians. prompt: the text is read in one pass. token: the next token behind it. text: token after token, "
    "with the shortest text as the prompt, summed over the lengths measured and on straight lines between them."
)
_FULL = "full"


@contextmanager
def progress(rounds: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr; gives the function that says what is measured, before each round."""
    columns = (SpinnerColumn(), TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=rounds, completed=-2)  # the first call warms up, the second begins round 0

        def advance(what: str) -> None:
            bar.update(task, description=what, advance=1)

        yield advance


def label(way: str) -> str:
    """The name of a way in the table: transformers' cache by its class."""
    return "DynamicCache" if way == _FULL else way


def show(found: Sequence[Measured], lengths: Sequence[int]) -> None:
    """Print the table, what doubling the length costs, and which lengths there was no time for."""
    console = Console(highlight=False)
    console.print(build_table(found))
    for line in [*doubling(found), *left_out(found, lengths)]:
        console.print(line, soft_wrap=True)


def build_table(found: Sequence[Measured]) -> Table:
    """One row for each length and way."""
    table = Table(title="Time of a text, token by token", caption=_CAPTION)
    # With headings of two lines, six columns fit a terminal of 80 characters.
    table.add_column("\ntokens", justify="right", no_wrap=True)
    table.add_column("\nway", no_wrap=True)
    for heading in ("prompt\nms", "token\nms", "quartiles\nms", "text\ns"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, row in enumerate(found):
        low, high = row.quartiles_ms
        table.add_row(
            f"{row.tokens:,}",
            label(row.way),
            f"{row.prompt_ms:,.0f}",
            f"{row.token_ms:,.1f}",
            f"{low:,.0f} to {high:,.0f}",
            f"{row.total_s:,.1f}",
            end_section=index + 1 < len(found) and found[index + 1].tokens != row.tokens,
        )
    return table


def doubling(found: Sequence[Measured]) -> list[str]:
    """A sentence for each way: by which factors its times grew over the last doubling of the length."""
    sentences = []
    for way in dict.fromkeys(row.way for row in found):
        own = [row for row in found if row.way == way]
        if len(own) < 3:  # the first total is a prompt alone
            continue
        before, last = own[-2:]
        sentences.append(
            f"{label(way)}: from {before.tokens:,} to {last.tokens:,} tokens a token took "
            f"{last.token_ms / before.token_ms:.2f} times as long, and the whole text "
            f"{last.total_s / before.total_s:.2f} times."
        )
    return sentences


def left_out(found: Sequence[Measured], lengths: Sequence[int]) -> list[str]:
    """A sentence on the lengths that were not measured; none if all were."""
    missing = [f"{length:,}" for length in lengths if length not in {row.tokens for row in found}]
    return [f"Not measured: {', '.join(missing)} tokens; raise --seconds."] if missing else []


def curve(own: Sequence[Measured], parts: int = 16) -> tuple[list[float], list[float]]:
    """Lengths and seconds of whole texts of one way, with ``parts`` points from each measured length to the next."""
    lengths, seconds = [float(own[0].tokens)], [own[0].total_s]
    for before, after in pairwise(own):
        for part in range(1, parts + 1):
            more = (after.tokens - before.tokens) * part / parts
            token_ms = before.token_ms + (after.token_ms - before.token_ms) * part / parts
            lengths.append(before.tokens + more)
            seconds.append(before.total_s + more * (before.token_ms + token_ms) / 2e3)
    return lengths, seconds


def draw(found: Sequence[Measured], path: Path, model: str) -> None:
    """Draw the time of a token and of the whole text against the length, side by side, on plain axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    token, total = figure.subplots(1, 2)
    for way in dict.fromkeys(row.way for row in found):
        own = [row for row in found if row.way == way]
        tokens = [row.tokens for row in own]
        style: dict[str, Any] = {"linestyle": "--" if way == NO_CACHE else "-", "marker": "o", "markersize": 4}
        (line,) = token.plot(tokens, [row.token_ms for row in own], label=label(way), **style)
        low, high = zip(*(row.quartiles_ms for row in own), strict=True)
        token.fill_between(tokens, low, high, color=line.get_color(), alpha=0.2)
        # The sum over tokens is curved between two lengths where the time of a token grows.
        total.plot(*curve(own), label=label(way), linestyle=style["linestyle"], color=line.get_color())
        total.plot(tokens, [row.total_s for row in own], "o", markersize=4, color=line.get_color())
    token.set(title="time of a token, and its quartiles", xlabel="tokens before it", ylabel="ms")
    total.set(title="time of a whole text", xlabel="tokens of the text", ylabel="s")
    for axes in (token, total):
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(True, alpha=0.3)
        axes.legend()
    figure.suptitle(Path(model).name)
    figure.savefig(path, dpi=110)
