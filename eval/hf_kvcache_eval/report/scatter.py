"""Loss against cost: mean KL against bytes, and against milliseconds a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter

from hf_kvcache_eval.cells import Metric
from hf_kvcache_eval.report.compare import ERRORS, LOSSLESS, pareto_front
from hf_kvcache_eval.report.document import Picture, code
from hf_kvcache_eval.report.formats import number
from hf_kvcache_eval.report.labels import Box, Label, place
from hf_kvcache_eval.report.load import Comparison
from hf_kvcache_eval.report.names import FULL, TaskName, is_baseline, is_full, is_noise_floor
from hf_kvcache_eval.report.style import Style, figure, log_ticks, save

#: The cost axis is logarithmic from this ratio of the largest to the smallest cost.
_WIDE = 3.0
#: A baseline whose cost is further than this ratio from all others would squeeze them together.
_FAR = 4.0


#: ``x0, y0, x1, y1`` in data coordinates.
Line = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """A cache at ``(cost, kl)``; ``spread`` is how far the cost reaches to either side of it."""

    cache: str
    cost: float
    kl: float
    stderr: float
    spread: tuple[float, float] = (0.0, 0.0)


def against_bytes(found: Comparison, task: TaskName, style: dict[str, Style], folder: Path) -> Picture | None:
    """The Pareto plot of a fidelity task; None without two points."""

    def cost(cache: str) -> Point | None:
        memory, kl = found.memory(cache, task.text), found.metric(cache, task.text, "kl")
        return Point(cache, memory.ratio_bf16, kl.value, kl.stderr or 0.0) if memory and kl else None

    drawing = _Drawing(found, task, style, f"pareto_{task.length}.png", "bytes held, of a bfloat16 DynamicCache")
    what = f"Mean KL to the full cache against bytes held ({code(task.text)})."
    return drawing.save(_points(found, cost), folder, what, lambda x: f"{100 * x:g} %")


def against_time(found: Comparison, style: dict[str, Style], folder: Path) -> Picture | None:
    """KL of the longest fidelity task against milliseconds a token; None without two points."""
    speed = found.speed_task
    if speed is None or not found.fidelity:
        return None
    task = found.fidelity[-1]

    def cost(cache: str) -> Point | None:
        time, kl = found.time(cache, speed), found.metric(cache, task.text, "kl")
        if time is None or kl is None:
            return None
        return Point(cache, time.median, kl.value, kl.stderr or 0.0, (time.median - time.low, time.high - time.median))

    full = found.time(FULL, speed)
    drawing = _Drawing(found, task, style, "speed.png", "ms a decoded token", full.median if full else None)
    what = f"Mean KL to the full cache ({code(task.text)}) against the time of a decoded token ({code(speed)}: median "
    what += "and quartiles); the dotted line is the full cache." if full else "and quartiles)."
    return drawing.save(_points(found, cost), folder, what, lambda x: f"{x:g}")


def _points(found: Comparison, cost: Callable[[str], Point | None]) -> list[Point]:
    """Every cache but the full one, whose KL is zero by definition, and the noise floor, which is drawn as a band."""
    caches = [cache for cache in found.caches if not is_full(cache) and not is_noise_floor(cache)]
    return [point for cache in caches if (point := cost(cache)) is not None]


@dataclass
class _Drawing:
    found: Comparison
    task: TaskName
    style: dict[str, Style]
    file: str
    cost: str
    full: float | None = None

    def save(self, points: Sequence[Point], folder: Path, what: str, tick: Callable[[float], str]) -> Picture | None:
        """Draw and write; the caption says what was left out or moved."""
        positive = [point.kl for point in points if point.kl > LOSSLESS]
        if len(points) < 2 or not positive:
            return None
        floor = self.found.metric(self.found.noise_floor or "", self.task.text, "kl")
        bottom = min([*positive, *([floor.value] if floor and floor.value > LOSSLESS else [])]) / 2
        near = [point for point in points if not _far(point, points)]
        shown = [replace(point, kl=max(point.kl, bottom)) for point in near]
        left_out = self._draw(shown, floor, bottom, folder, tick)
        remarks = self._remarks(near, floor, left_out)
        for point in (point for point in points if point not in near):
            where = f"{tick(float(f'{point.cost:.3g}'))} with a KL of {number(point.kl, point.stderr)}"
            remarks.append(f"Far off the plot: {code(point.cache)} at {where}.")
        return Picture(self.file, " ".join([what, *remarks]))

    def _draw(
        self, points: Sequence[Point], floor: Metric | None, bottom: float, folder: Path, tick: Callable[[float], str]
    ) -> set[str]:
        """Everything that is on the plot; returns the caches for whose names there was no room."""
        drawn = figure(8.6, 5.4)
        plot = drawn.subplots()
        self._axes(plot, points, tick)
        lines = [line for point in points for line in self._point(plot, point)]
        lines += self._front(plot, points)
        if floor is not None:
            _band(plot, floor, bottom)
        # Labels are placed in pixels, so nothing may move after them.
        drawn.draw_without_rendering()
        drawn.set_layout_engine("none")
        labels = [Label(point.cost, point.kl, point.cache, self.style[point.cache].color) for point in points]
        notes = place(plot, labels, [_in_pixels(plot, line) for line in lines])
        save(drawn, folder / self.file)
        return {point.cache for point in points} - {note.get_text() for note in notes}

    def _axes(self, plot: Any, points: Sequence[Point], tick: Callable[[float], str]) -> None:
        costs = [point.cost for point in points] + ([self.full] if self.full else [])
        plot.set_yscale("log")
        if max(costs) > _WIDE * min(costs):
            plot.set_xscale("log")
            plot.set_xlim(min(costs) / 1.25, max(costs) * 1.25)
            log_ticks(plot.xaxis, lambda x: tick(float(f"{x:.6g}")))
        else:
            margin = 0.08 * (max(costs) - min(costs)) or 0.1 * max(costs)
            plot.set_xlim(max(0.0, min(costs) - margin), max(costs) + margin)
            plot.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tick(float(f"{x:.6g}"))))
        plot.set_xlabel(self.cost)
        plot.set_ylabel(f"mean KL to the full cache, nats a token ({self.task.text})")
        if self.full:
            plot.axvline(self.full, color="black", linewidth=1, linestyle=":")

    def _point(self, plot: Any, point: Point) -> list[Line]:
        """The point with its error bars, which are returned."""
        look = self.style[point.cache]
        low = max(point.kl - point.stderr, point.kl / 3)
        left, right = point.cost - point.spread[0], point.cost + point.spread[1]
        plot.errorbar(
            [point.cost],
            [point.kl],
            yerr=[[point.kl - low], [point.stderr]],
            xerr=[[point.spread[0]], [point.spread[1]]] if any(point.spread) else None,
            fmt=look.marker,
            color=look.color,
            markersize=6,
            elinewidth=1,
            capsize=2,
            zorder=3,
        )
        return [(point.cost, low, point.cost, point.kl + point.stderr), (left, point.kl, right, point.kl)]

    def _front(self, plot: Any, points: Sequence[Point]) -> list[Line]:
        """The staircase under which no cache lies; returns its steps."""
        front = [points[i] for i in pareto_front([(point.cost, point.kl) for point in points])]
        x, y = [point.cost for point in front], [point.kl for point in front]
        x, y = [*x, plot.get_xlim()[1]], [*y, y[-1]]
        plot.step(x, y, where="post", color="#aaaaaa", linewidth=1, zorder=1)
        flat = [(x[i], y[i], x[i + 1], y[i]) for i in range(len(x) - 1)]
        return flat + [(x[i + 1], y[i + 1], x[i + 1], y[i]) for i in range(len(x) - 1)]

    def _remarks(self, points: Sequence[Point], floor: Metric | None, left_out: set[str]) -> list[str]:
        told = ["Bars are one standard error; the gray line is the Pareto front."]
        if floor is not None:
            told.append(
                f"The band is the noise floor ({code(self.found.noise_floor or '')}, ± {ERRORS:g} standard errors)."
            )
        if clipped := [point.cache for point in points if point.kl <= LOSSLESS]:
            names = ", ".join(map(code, clipped))
            told.append(f"Lossless up to rounding (KL below {LOSSLESS:g}), drawn at the lower edge: {names}.")
        if left_out:
            told.append(f"Without a label, for want of room: {', '.join(map(code, sorted(left_out)))}.")
        return told


def _band(plot: Any, floor: Metric, bottom: float) -> None:
    """The noise floor: its line and a band around it; a band that reaches zero goes to the edge of the plot."""
    reach = ERRORS * (floor.stderr or 0.0)
    low, high = floor.value - reach, max(floor.value + reach, bottom)
    plot.axhspan(max(low, bottom / 2), high, color="#bbbbbb", alpha=0.35, linewidth=0, zorder=0)
    if floor.value > 0:
        plot.axhline(floor.value, color="#555555", linewidth=1, linestyle="--", zorder=0)
    plot.annotate(
        "noise floor", (1, high), (-3, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
        ha="right", va="bottom", fontsize=8, color="#555555",
    )  # fmt: skip


def _far(point: Point, points: Sequence[Point]) -> bool:
    """Whether a baseline's cost is so far from all others that the plot would show little else."""
    others = [other.cost for other in points if other is not point and not is_baseline(other.cache)]
    if not is_baseline(point.cache) or not others:
        return False
    return not min(others) / _FAR <= point.cost <= max(others) * _FAR


def _in_pixels(plot: Any, line: Line) -> Box:
    """A line in data coordinates as a box in pixels, a pixel wider to each side."""
    (x0, y0), (x1, y1) = plot.transData.transform([line[:2], line[2:]]).tolist()
    return Box(x0, y0, x1, y1).padded(1)
