"""Names beside points, placed so that none covers another, a marker, or the plot's edge.

Greedy: points with the most neighbors choose first; each takes the nearest free place around it and a thin line
shows what it belongs to where that is not next to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text

#: Pixels kept free around a label, and half a marker's side, at 100 dots an inch.
_PADDING, _MARKER = 1.5, 5.0
_ANGLES, _RADII = 24, 40
#: What a label's line costs for crossing a label or a marker, in pixels of distance.
_CROSSING = 60.0


class Box(NamedTuple):
    """A rectangle in pixels. (Matplotlib's own takes a hundred times as long to say what it overlaps.)"""

    x0: float
    y0: float
    x1: float
    y1: float

    def padded(self, by: float) -> Box:
        return Box(self.x0 - by, self.y0 - by, self.x1 + by, self.y1 + by)

    def overlaps(self, other: Box) -> bool:
        return self.x0 < other.x1 and other.x0 < self.x1 and self.y0 < other.y1 and other.y0 < self.y1

    def holds(self, x: float, y: float) -> bool:
        return self.x0 <= x <= self.x1 and self.y0 <= y <= self.y1


@dataclass(frozen=True)
class Label:
    """A name at a point in data coordinates."""

    x: float
    y: float
    text: str
    color: str


def place(axes: Axes, labels: Sequence[Label], lines: Sequence[Box] = ()) -> list[Annotation]:
    """Draw ``labels``; what has no free place anywhere is left out.

    Args:
        axes: with its limits and its layout final.
        labels: names of points.
        lines: boxes in pixels that labels rather avoid, such as error bars.

    Returns:
        What was drawn, in the order of the placing.
    """
    figure: Any = axes.get_figure()
    scale = figure.dpi / 100
    renderer = figure.canvas.get_renderer()
    points: list[tuple[float, float]] = [
        tuple(axes.transData.transform((label.x, label.y)).tolist()) for label in labels
    ]
    markers = [_around(x, y, _MARKER * scale) for x, y in points]
    inside = Box(*axes.get_window_extent(renderer).extents)
    taken: list[Box] = []
    avoided, drawn = list(lines), []
    for index in sorted(range(len(labels)), key=lambda i: _room(points, i)):
        note = _annotation(axes, labels[index])
        size = _text_size(note, renderer)
        obstacles = _Obstacles(inside, markers, taken, avoided, _PADDING * scale)
        box = _best(points[index], size, obstacles, scale)
        if box is None:
            note.remove()
            continue
        if _move(note, points[index], box, scale):
            avoided += [Box(*step, *step).padded(scale) for step in _steps(points[index], box)]
        taken.append(box)
        drawn.append(note)
    return drawn


@dataclass(frozen=True)
class _Obstacles:
    """What a label may not cover (``markers``, ``taken``), must stay in, and rather avoids (``lines``)."""

    inside: Box
    markers: list[Box]
    taken: list[Box]
    lines: list[Box]
    padding: float

    def free(self, box: Box) -> bool:
        wide = box.padded(self.padding)
        within = self.inside.x0 <= wide.x0 and wide.x1 <= self.inside.x1
        within = within and self.inside.y0 <= wide.y0 and wide.y1 <= self.inside.y1
        return within and not any(wide.overlaps(other) for other in (*self.markers, *self.taken))

    def crossed(self, start: tuple[float, float], box: Box) -> int:
        """Labels and foreign markers that a line from ``start`` to the box runs over, and lines under the box."""
        steps = _steps(start, box)
        foreign = [marker for marker in self.markers if not marker.holds(*start)]
        over = sum(any(other.holds(*step) for step in steps) for other in (*foreign, *self.taken))
        return over + sum(box.overlaps(line) for line in self.lines)


def _best(point: tuple[float, float], size: tuple[float, float], obstacles: _Obstacles, scale: float) -> Box | None:
    """The cheapest free box of ``size`` around ``point``."""
    found: tuple[float, Box] | None = None
    for distance, box in _candidates(point, size, scale):
        if found is not None and distance >= found[0]:
            break
        if obstacles.free(box):
            cost = distance + _CROSSING * scale * obstacles.crossed(point, box)
            if found is None or cost < found[0]:
                found = (cost, box)
    return found[1] if found else None


def _candidates(point: tuple[float, float], size: tuple[float, float], scale: float) -> Iterator[tuple[float, Box]]:
    """Boxes around ``point``, nearest first; to the right first among equals, where names are read from."""
    half_width, half_height = size[0] / 2, size[1] / 2
    for ring in range(_RADII):
        radius = (8 + 6 * ring) * scale
        for step in range(_ANGLES):
            angle = 2 * math.pi * ((step + 1) // 2) / _ANGLES * (1 if step % 2 else -1)
            # The radius is that of the gap: wide labels stand off sideways by half their width more.
            x = point[0] + math.cos(angle) * (radius + half_width)
            y = point[1] + math.sin(angle) * (radius + half_height)
            yield radius, Box(x - half_width, y - half_height, x + half_width, y + half_height)


def _annotation(axes: Axes, label: Label) -> Annotation:
    return axes.annotate(
        label.text,
        (label.x, label.y),
        (0, 0),
        textcoords="offset points",
        color=label.color,
        fontsize=8,
        ha="center",
        va="center",
        path_effects=[withStroke(linewidth=2, foreground="white")],
        arrowprops={"arrowstyle": "-", "color": label.color, "lw": 0.5, "alpha": 0.7, "shrinkA": 0, "shrinkB": 3},
    )


def _text_size(note: Annotation, renderer: Any) -> tuple[float, float]:
    """Width and height in pixels, without the line to the point."""
    box = Text.get_window_extent(note, renderer)
    return box.width, box.height


def _move(note: Annotation, point: tuple[float, float], box: Box, scale: float) -> bool:
    """Center the note on ``box``; says whether it needs a line, as it does unless it stands next to its point."""
    points_per_pixel = 72 / (100 * scale)
    middle = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
    note.set_position(((middle[0] - point[0]) * points_per_pixel, (middle[1] - point[1]) * points_per_pixel))
    line = math.dist(point, _nearest(point, box)) >= 14 * scale
    if note.arrow_patch is not None:
        note.arrow_patch.set_visible(line)
    return line


def _steps(start: tuple[float, float], box: Box) -> list[tuple[float, float]]:
    """Points along the line from ``start`` to the nearest side of ``box``."""
    end = _nearest(start, box)
    return [(start[0] + t / 12 * (end[0] - start[0]), start[1] + t / 12 * (end[1] - start[1])) for t in range(13)]


def _room(points: Sequence[tuple[float, float]], index: int) -> float:
    """Mean distance to the three nearest other points: small in a crowd."""
    near = sorted(math.dist(points[index], other) for i, other in enumerate(points) if i != index)[:3]
    return sum(near) / max(1, len(near))


def _nearest(point: tuple[float, float], box: Box) -> tuple[float, float]:
    return min(max(point[0], box.x0), box.x1), min(max(point[1], box.y0), box.y1)


def _around(x: float, y: float, half: float) -> Box:
    return Box(x - half, y - half, x + half, y + half)
