"""Headline metrics of all caches, a panel a task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from hf_kvcache_eval.cells import Metric
from hf_kvcache_eval.report.document import Picture
from hf_kvcache_eval.report.headline import by_bytes
from hf_kvcache_eval.report.load import Comparison
from hf_kvcache_eval.report.names import FULL, TaskName, is_full
from hf_kvcache_eval.report.style import Style, figure, log_ticks, save

_COLUMNS = 4
#: A ratio of the largest to the smallest value from which bars would show nothing but the largest.
_WIDE = 20.0


def task_bars(
    found: Comparison, tasks: Sequence[TaskName], style: dict[str, Style], folder: Path, name: str
) -> Picture | None:
    """Bars of each task's headline metric with the full cache as a line; None where no cache has any."""
    caches = [c for c in by_bytes(found) if not is_full(c) and any(found.metric(c, t.text) for t in tasks)]
    if not tasks or not caches:
        return None
    rows = -(-len(tasks) // _COLUMNS)
    columns = -(-len(tasks) // rows)
    drawn = figure(2.0 * columns + 1.8, (0.19 * len(caches) + 0.75) * rows)
    grid = list(drawn.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for plot, task in zip(grid, tasks, strict=False):
        _panel(plot, found, task, caches, style)
    for plot in grid[len(tasks) :]:
        plot.set_visible(False)
    save(drawn, folder / f"{name}.png")
    what = (
        "Headline metrics with bars of one standard error; the line and its band are the full cache and its standard "
        "error. Points instead of bars stand on logarithmic axes. Caches by bytes held."
    )
    return Picture(f"{name}.png", what)


def _panel(plot: Any, found: Comparison, task: TaskName, caches: Sequence[str], style: dict[str, Style]) -> None:
    there = [(row, cache, metric) for row, cache in enumerate(caches) if (metric := found.metric(cache, task.text))]
    full = found.metric(FULL, task.text)
    wide = _wide([metric for _, _, metric in there] + ([full] if full else []))
    if wide:
        plot.set_xscale("log")
    else:
        plot.xaxis.set_major_locator(MaxNLocator(4))
    for row, cache, metric in there:
        _one(plot, row, metric, style[cache], wide)
    if full is not None:
        plot.axvline(full.value, color="black", linewidth=1, zorder=2)
        if full.stderr:
            low, high = full.value - full.stderr, full.value + full.stderr
            plot.axvspan(low, high, color="black", alpha=0.12, linewidth=0, zorder=0)
    plot.set_yticks(range(len(caches)), caches, fontsize=8)
    if wide:
        log_ticks(plot.xaxis)
    plot.set_ylim(len(caches) - 0.4, -0.6)
    plot.grid(axis="y", visible=False)
    plot.tick_params(axis="x", labelsize=8)
    headline = found.headline_name(task.text)
    better = full or (there[0][2] if there else Metric(0.0))
    plot.set_title(f"{task.text}\n{headline} {'(more is better)' if better.higher_is_better else '(less is better)'}")
    plot.title.set_fontsize(8)


def _wide(metrics: Sequence[Metric]) -> bool:
    """Whether the values span too much for bars; shares do not, their zero means something."""
    values = [metric.value for metric in metrics if not metric.higher_is_better]
    return bool(values) and min(values) > 0 and max(values) > _WIDE * min(values)


def _one(plot: Any, row: int, metric: Metric, look: Style, wide: bool) -> None:
    error = metric.stderr or 0.0
    if wide:
        low = metric.value - max(metric.value - error, metric.value / 3)
        plot.errorbar([metric.value], [row], xerr=[[low], [error]], fmt=look.marker, color=look.color, markersize=5)
        return
    plot.barh([row], [metric.value], height=0.72, color=look.color, alpha=0.8, zorder=1)
    plot.errorbar([metric.value], [row], xerr=[error], fmt="none", ecolor="#333333", elinewidth=0.9, zorder=3)
