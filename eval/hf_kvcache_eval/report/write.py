"""From the folder of a comparison to its CSV file, and from that to its report."""

from __future__ import annotations

from pathlib import Path

from hf_kvcache_eval.report import markdown, page
from hf_kvcache_eval.report.bars import task_bars
from hf_kvcache_eval.report.budget_plots import by_budget
from hf_kvcache_eval.report.budgets import budget_sections
from hf_kvcache_eval.report.conclusions import conclusions
from hf_kvcache_eval.report.curves import by_distance, by_length
from hf_kvcache_eval.report.document import Block, Heading, Picture
from hf_kvcache_eval.report.header import failures, header, how_to_read, title
from hf_kvcache_eval.report.headline import headline
from hf_kvcache_eval.report.load import Comparison, load
from hf_kvcache_eval.report.records import read_csv, write_csv
from hf_kvcache_eval.report.scatter import against_bytes, against_time
from hf_kvcache_eval.report.style import settings, styles
from hf_kvcache_eval.report.tasktables import speed_section, task_sections

#: More caches than this cannot be told apart in a picture; policies by their budgets can.
PICTURED = 60


def write_report(folder: Path, out: Path | None = None) -> list[Path]:
    """Write ``results.csv``, and from it ``report.md``, ``report.html`` and PNGs; the same cells give the same files.

    Args:
        folder: of the comparison, with ``cells`` and ``timings``.
        out: where to write; ``folder`` if None. Made where it does not exist.

    Returns:
        The files written: Markdown, HTML, the pictures, then the CSV.

    Raises:
        ValueError: if the folder has no cell that can be read.
    """
    measured = load(folder)
    out = out or folder
    out.mkdir(parents=True, exist_ok=True)
    table = out / "results.csv"
    write_csv(measured, table)
    found = read_csv(table)
    with settings():
        shown = pictures(found, out) if len(found.caches) <= PICTURED else by_budget(found, out)
    files = _texts(content(found, shown), out, title(found))
    return [*files, *(out / picture.file for picture in shown), table]


def content(found: Comparison, shown: list[Picture]) -> list[Block]:
    """The whole report, with the pictures ``shown``."""
    blocks = [*header(found), *budget_sections(found), *headline(found)]
    blocks += [Heading(2, "Pictures"), *shown] if shown else []
    return [
        *blocks,
        *speed_section(found),
        *task_sections(found),
        *failures(found),
        *how_to_read(),
        *conclusions(found),
    ]


def pictures(found: Comparison, out: Path) -> list[Picture]:
    """Draw what the cells have the numbers for."""
    style = styles(found.caches)
    drawn = [against_bytes(found, task, style, out) for task in reversed(found.fidelity)]
    drawn.append(against_time(found, style, out))
    drawn += [by_distance(found, task, style, out) for task in reversed(found.fidelity)]
    for name, tasks in {"retrieval": found.retrieval, "quote": found.quotes, "language": found.language}.items():
        drawn.append(task_bars(found, tasks, style, out, f"tasks_{name}"))
    drawn.append(by_length(found, style, out))
    return [picture for picture in drawn if picture is not None]


def _texts(blocks: list[Block], out: Path, name: str) -> list[Path]:
    files = {"report.md": markdown.render(blocks), "report.html": page.render(blocks, out, name)}
    for file, text in files.items():
        (out / file).write_text(text, encoding="utf-8")
    return [out / file for file in files]
