"""How plots look: one color and one marker a family of caches in all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from hf_kvcache_eval.report.names import family, is_baseline, is_full, is_noise_floor

DPI = 160
#: Okabe and Ito's colors, which the common sorts of color blindness keep apart; without yellow, too pale for lines;
#: further ones are from Tol's muted set. Markers tell apart what colors do not.
_COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#6A3D9A",
    "#8C564B",
    "#999933",
    "#882255",
    "#44AA99",
)
_MARKERS = "osD^vPX<>ph*"
_GRAY, _BLACK = "#777777", "#000000"
_LINES = ("-", "--", ":", "-.")
_SETTINGS: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.which": "major",
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Style:
    """How one cache is drawn."""

    color: str
    marker: str
    line: str = "-"


def styles(caches: Sequence[str]) -> dict[str, Style]:
    """A style a cache: families differ in color and marker, members of one in their line."""
    plain = [cache for cache in caches if not (is_full(cache) or is_noise_floor(cache) or is_baseline(cache))]
    families = sorted({family(cache) for cache in plain})
    found: dict[str, Style] = {}
    for cache in caches:
        if cache not in plain:
            blind = [name for name in caches if is_baseline(name)]
            found[cache] = (
                Style(_GRAY, "x", _LINES[blind.index(cache) % len(_LINES)])
                if is_baseline(cache)
                else Style(_BLACK, "+", "-" if is_full(cache) else ":")
            )
            continue
        index = families.index(family(cache))
        members = [name for name in plain if family(name) == families[index]]
        line = _LINES[members.index(cache) % len(_LINES)]
        found[cache] = Style(_COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)], line)
    return found


def settings(dpi: int = DPI) -> AbstractContextManager[None]:
    """The report's look, for everything that is drawn inside; ``dpi`` pixels an inch."""
    return mpl.rc_context(_SETTINGS | {"figure.dpi": dpi})


def figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches; not pyplot's, so nothing global keeps it and no display is looked for."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn


def log_ticks(axis: Any, tick: Callable[[float], str] = lambda x: f"{x:g}") -> None:
    """Ticks of a logarithmic axis at plain numbers: within less than a decade powers of ten alone would say little."""
    low, high = axis.get_view_interval()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 1.5, 2, 3, 4, 5, 6, 8) if high < 10 * low else (1, 2, 5) if high < 100 * low else (1,)
    axis.set_major_locator(FixedLocator([step * 10.0**decade for decade in decades for step in steps]))
    axis.set_major_formatter(FuncFormatter(lambda x, _: tick(x)))
    axis.set_minor_locator(NullLocator())


def save(drawn: Figure, path: Path) -> None:
    """Write a PNG; nothing in it depends on the time."""
    drawn.savefig(path, dpi="figure", metadata={"Software": None})
