"""The tracked form of a comparison: one CSV file, and the page of the documentation that is made from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from PIL import Image

from hf_kvcache_eval.report import markdown
from hf_kvcache_eval.report.budget_plots import by_budget
from hf_kvcache_eval.report.curves import by_distance
from hf_kvcache_eval.report.document import Picture
from hf_kvcache_eval.report.load import Comparison, load
from hf_kvcache_eval.report.records import read_csv, write_csv
from hf_kvcache_eval.report.scatter import against_bytes, against_time
from hf_kvcache_eval.report.style import settings, styles
from hf_kvcache_eval.report.write import PICTURED, content

#: Pictures of a page, and pixels an inch: they are tracked, so they are few and small.
_PICTURES, _DPI, _COLORS = 2, 75, 32


def publish(folder: Path, out: Path, name: str | None = None, *, add: bool = False) -> list[Path]:
    """Write the CSV of the comparison in ``folder`` to ``out``, and its page; returns the files written.

    Args:
        folder: of the comparison, with ``cells`` and ``timings``.
        out: where to write. Made where it does not exist.
        name: of the CSV without its suffix; the folder's if None.
        add: keep the rows of a CSV that is there, and put those of the folder in or over them. Each cell keeps the
            machine and date that it was measured on.

    Raises:
        ValueError: if the folder has no cell that can be read, or ``add`` finds another sort of CSV there.
    """
    found = load(folder)
    out.mkdir(parents=True, exist_ok=True)
    table = out / f"{name or folder.resolve().name}.csv"
    if add and table.exists():
        found = _over(read_csv(table), found)
    write_csv(found, table)
    return [table, *write_page(table)]


def _over(old: Comparison, new: Comparison) -> Comparison:
    """Both comparisons' cells; the new one's where both have one. A new failure replaces no finished cell."""
    done = old.done | new.done
    failed = {(cell.cache, cell.task): cell for cell in (*old.failed, *new.failed)}
    return Comparison(
        done=done,
        failed=[cell for key, cell in failed.items() if key not in done],
        unreadable=sorted({*old.unreadable, *new.unreadable}),
        timings=old.timings | new.timings,
    )


def write_page(table: Path, out: Path | None = None) -> list[Path]:
    """Make the page of a CSV file again: Markdown and at most two pictures, named like it.

    Args:
        table: the CSV file.
        out: where to write; beside the CSV if None. The page links to a CSV file beside itself.

    Raises:
        ValueError: if the file is none of a comparison.
    """
    found, out = read_csv(table), out or table.parent
    out.mkdir(parents=True, exist_ok=True)
    shown = (_pictures if len(found.caches) <= PICTURED else _budgets)(found, out, table.stem)
    title, rest = markdown.render(content(found, shown)).split("\n\n", 1)
    source = f"All figures: [{table.name}]({table.name}). This page is made from them: `hf-kvcache-eval report CSV`."
    page = out / f"{table.stem}.md"
    page.write_text(f"{title}: {table.stem}\n\n{source}\n\n{rest}", encoding="utf-8")
    return [page, *(out / picture.file for picture in shown)]


def _pictures(found: Comparison, out: Path, stem: str) -> list[Picture]:
    """The first two that the comparison has the numbers for, of its longest fidelity task."""
    style = styles(found.caches)
    drawers: dict[str, Callable[[], Picture | None]] = {"time": lambda: against_time(found, style, out)}
    if found.fidelity:
        task = found.fidelity[-1]
        drawers = {"bytes": lambda: against_bytes(found, task, style, out)} | drawers
        drawers["distance"] = lambda: by_distance(found, task, style, out)
    shown: list[Picture] = []
    with settings(_DPI):
        for suffix, draw in drawers.items():
            if len(shown) < _PICTURES and (picture := draw()) is not None:
                shown.append(_tracked(picture, out, f"{stem}_{suffix}.png"))
    return shown


def _budgets(found: Comparison, out: Path, stem: str) -> list[Picture]:
    """Where there are too many caches for the others: policies by the shares that they keep."""
    with settings(_DPI):
        drawn = by_budget(found, out)[:_PICTURES]
        return [_tracked(picture, out, f"{stem}_{picture.file.removeprefix('budget_')}") for picture in drawn]


def _tracked(picture: Picture, out: Path, name: str) -> Picture:
    """The picture under another name and with fewer colors."""
    reduce_colors((out / picture.file).replace(out / name))
    return replace(picture, file=name)


def reduce_colors(file: Path, colors: int = _COLORS) -> None:
    """Write a PNG again with a palette, which takes a third of the bytes."""
    with Image.open(file) as image:
        small = image.convert("RGB").quantize(colors, dither=Image.Dither.NONE)
    small.save(file, optimize=True)
