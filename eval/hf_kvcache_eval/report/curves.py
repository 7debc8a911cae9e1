"""Lines: loss by distance from the prefix, and retrieval by length, each for a choice of caches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from hf_kvcache_eval.cells import Series
from hf_kvcache_eval.report.compare import LOSSLESS, pareto_front
from hf_kvcache_eval.report.document import Picture, code
from hf_kvcache_eval.report.load import FOUND, Comparison
from hf_kvcache_eval.report.names import FULL, TaskName, is_baseline, is_full, is_noise_floor
from hf_kvcache_eval.report.style import Style, figure, log_ticks, save

#: Lines that can be told apart in one plot.
_LINES = 7
#: A ratio of the largest to the smallest value from which an axis is logarithmic.
_WIDE = 4.0


def choice(found: Comparison) -> list[str]:
    """Caches for plots of lines: the noise floor and a baseline, the Pareto front, then what lies evenly between."""
    task = found.fidelity[-1].text if found.fidelity else None
    losses = {cache: kl.value for cache in found.caches if task and (kl := found.metric(cache, task, "kl"))}
    lossy = {cache: kl for cache, kl in losses.items() if kl > LOSSLESS and not is_full(cache)}
    if not lossy:
        return _thinned([cache for cache in found.caches if not is_full(cache)], _LINES)
    fixed = [cache for cache in lossy if is_noise_floor(cache)][:1] + [cache for cache in lossy if is_baseline(cache)][
        :1
    ]
    plain = {cache: kl for cache, kl in lossy.items() if not (is_noise_floor(cache) or is_baseline(cache))}
    chosen = _front(found, plain, task)[: _LINES - len(fixed)]
    others = sorted(plain.keys() - set(chosen), key=lambda cache: (plain[cache], cache))
    chosen += _thinned(others, _LINES - len(fixed) - len(chosen))
    return sorted([*fixed, *chosen], key=lambda cache: lossy[cache])


def _front(found: Comparison, losses: Mapping[str, float], task: str | None) -> list[str]:
    """The Pareto front, those first that nothing beats for the widest range of bytes."""
    sized = [(cache, memory.ratio_bf16) for cache in losses if (memory := found.memory(cache, task))]
    front = [sized[i] for i in pareto_front([(size, losses[cache]) for cache, size in sized])]
    ends = [*(size for _, size in front[1:]), math.inf]
    wide = sorted(zip(front, ends, strict=False), key=lambda step: step[0][1] / step[1])
    return [cache for (cache, _), _ in wide]


def by_distance(found: Comparison, task: TaskName, style: dict[str, Style], folder: Path) -> Picture | None:
    """KL and ΔNLL over the distance from the prefix; None where no cache has the curves."""
    caches = [cache for cache in choice(found) if _series(found, cache, task, "kl").x]
    if not caches:
        return None
    drawn = figure(9.6, 4.4)
    left, right = drawn.subplots(1, 2)
    clipped = [cache for cache in caches if not _line(left, found, cache, task, "kl", style[cache])]
    for cache in caches:
        _line(right, found, cache, task, "delta_nll", style[cache], positive=False)
    left.set_yscale("log")
    right.set_yscale("symlog", linthresh=_linear(found, caches, task), linscale=0.6)
    right.axhline(0, color="black", linewidth=0.8)
    for plot, name in ((left, "KL, nats a token"), (right, "change of NLL, nats a token")):
        _lengths(plot, sorted({x for cache in caches for x in _series(found, cache, task, "kl").x}))
        plot.set_xlabel("tokens after the prefix")
        plot.set_title(name, loc="left")
    legend(drawn, left)
    save(drawn, folder / f"distance_{task.length}.png")
    note = f" Points at or below zero are left out: {', '.join(map(code, clipped))}." if clipped else ""
    what = (
        f"Loss by distance from the compressed prefix ({code(task.text)}), means over windows, bands of one standard "
        "error; the change of NLL is linear around zero. A choice of caches."
    )
    return Picture(f"distance_{task.length}.png", what + note)


def by_length(found: Comparison, style: dict[str, Style], folder: Path) -> Picture | None:
    """Retrieval and quotation over the context's length, a panel a task; None where no task has two lengths."""
    panels = _panels(found)
    caches = [FULL, *choice(found)] if FULL in found.caches else choice(found)
    if not panels or not caches:
        return None
    rows = -(-len(panels) // 3)
    columns = -(-len(panels) // rows)
    drawn = figure(3.4 * columns + (1.6 if columns == 1 else 0), 2.6 * rows + 0.8)
    grid = list(drawn.subplots(rows, columns, squeeze=False).flat)
    for plot, tasks in zip(grid, panels, strict=False):
        _panel(plot, found, tasks, caches, style)
    for plot in grid[len(panels) :]:
        plot.set_visible(False)
    legend(drawn, drawn.axes[0])
    save(drawn, folder / "lengths.png")
    what = "Retrieval (share of the answer found, more is better) and quotation (NLL, less is better) by length of the "
    what += "context, bars of one standard error. Points of one length are set side by side. A choice of caches."
    return Picture("lengths.png", what)


def _panels(found: Comparison) -> list[list[TaskName]]:
    """Lengths of one task and variant, where there are several."""
    together: dict[tuple[str, str], list[TaskName]] = {}
    for task in (*found.retrieval, *found.quotes):
        if task.length is not None:
            together.setdefault((task.base, task.variant), []).append(task)
    return [sorted(tasks, key=lambda task: task.order) for tasks in together.values() if len(tasks) > 1]


def _panel(plot: Any, found: Comparison, tasks: Sequence[TaskName], caches: Sequence[str], style: Any) -> None:
    for index, cache in enumerate(caches):
        # Side by side, because many caches find everything and would lie on one another.
        shift = 1 + 0.02 * (index - (len(caches) - 1) / 2)
        points = [(task.length or 0, metric) for task in tasks if (metric := found.metric(cache, task.text))]
        look = style[cache]
        plot.errorbar(
            [length * shift for length, _ in points],
            [metric.value for _, metric in points],
            yerr=[metric.stderr or 0.0 for _, metric in points],
            color=look.color,
            marker=look.marker,
            linestyle=look.line,
            linewidth=1.2,
            markersize=4,
            elinewidth=0.8,
            label=cache,
        )
    first = tasks[0]
    headline = found.headline_name(first.text) or ""
    if headline in FOUND:
        plot.set_ylim(-0.05, 1.05)
    elif _spread(found, tasks, caches) > _WIDE:
        plot.set_yscale("log")
        log_ticks(plot.yaxis)
    plot.set_title(f"{first.base}{', ' + first.variant if first.variant else ''}: {headline}", loc="left")
    _lengths(plot, [float(task.length or 0) for task in tasks])
    plot.set_xlabel("tokens of context")


def _spread(found: Comparison, tasks: Sequence[TaskName], caches: Sequence[str]) -> float:
    """Largest over smallest headline metric; 1 where one is not positive."""
    metrics = [metric for task in tasks for cache in caches if (metric := found.metric(cache, task.text))]
    values = [metric.value for metric in metrics]
    return max(values) / min(values) if values and min(values) > 0 else 1.0


def _line(
    plot: Any, found: Comparison, cache: str, task: TaskName, name: str, look: Style, positive: bool = True
) -> bool:
    """Draw one curve and its band; False if points had to be left out because a log axis cannot show them."""
    series = _series(found, cache, task, name)
    points = [p for p in zip(series.x, series.y, series.stderr, strict=True) if p[1] > 0 or not positive]
    x, y, error = ([p[i] for p in points] for i in range(3))
    plot.plot(x, y, color=look.color, marker=look.marker, linestyle=look.line, linewidth=1.3, markersize=4, label=cache)
    low = [max(a - e, a / 3) if positive else a - e for a, e in zip(y, error, strict=True)]
    high = [a + e for a, e in zip(y, error, strict=True)]
    plot.fill_between(x, low, high, color=look.color, alpha=0.1, linewidth=0)
    return len(points) == len(series.x)


def _linear(found: Comparison, caches: Sequence[str], task: TaskName) -> float:
    """Up to where the axis of ΔNLL is linear: the median of the standard errors, below which signs say nothing."""
    errors = sorted(e for cache in caches for e in _series(found, cache, task, "delta_nll").stderr if e > 0)
    return errors[len(errors) // 2] if errors else 1e-3


def _series(found: Comparison, cache: str, task: TaskName, name: str) -> Series:
    cell = found.cell(cache, task.text)
    return (cell.series.get(name) if cell else None) or Series([], [], [], "", "")


def _lengths(plot: Any, ticks: Sequence[float]) -> None:
    plot.set_xscale("log", base=2)
    plot.set_xticks(ticks)
    plot.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    plot.xaxis.set_minor_locator(NullLocator())
    plot.xaxis.set_minor_formatter(NullFormatter())


def legend(drawn: Any, plot: Any) -> None:
    """The legend of ``plot`` below the whole figure, in as many columns as there is room for."""
    handles, names = plot.get_legend_handles_labels()
    # A letter takes about half of the 8 points of the type.
    room = int(drawn.get_figwidth() * 72 / 4.5)
    columns = max(1, min(4, len(names), room // (max(map(len, names)) + 8)))
    drawn.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _thinned(items: Sequence[str], count: int) -> list[str]:
    """At most ``count`` of ``items``, evenly spread, the ends among them."""
    if len(items) <= count or count < 1:
        return list(items[: max(0, count)])
    if count == 1:
        return [items[0]]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
