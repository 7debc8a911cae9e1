"""README's plot: quality against bytes held, and decoding speed beside it, from the tracked CSV files alone."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, NullLocator

from hf_kvcache_eval.report.load import Comparison
from hf_kvcache_eval.report.published import reduce_colors
from hf_kvcache_eval.report.records import read_csv
from hf_kvcache_eval.report.style import figure, save, settings

#: What ``QuantizedKVCache(bits=...)`` takes, and other caches, by their names in the standard suite.
OURS = {"rotated8": "8 bits", "unbiased4": "4 bits", "unbiased3": "3 bits", "unbiased2": "2 bits"}
PEERS = {"hf-fp8": "fp8", "quanto4": "quanto, 4 bits", "hqq4": "hqq, 4 bits"}
#: Where a label stands beside its point, in points of type, where the usual place is taken.
_PLACES = {"unbiased3": (-7, -9, "right"), "quanto4": (7, 7, "left"), "hqq4": (7, -5, "left")}
#: The bars, by their names in the benchmark of a whole model.
BARS = {
    "ours 4-bit": "QuantizedKVCache, 4 bits",
    "ours 8-bit": "QuantizedKVCache, 8 bits",
    "StaticCache": "StaticCache",
    "DynamicCache": "DynamicCache",
    "hqq 4-bit": "QuantizedCache, hqq 4 bits",
    "fp8 QuantizedCache": "QuantizedCache, fp8",
}
_MODEL = "SmolLM2-135M"
#: Okabe and Ito's blue and vermilion, which all common sorts of color blindness keep apart; markers differ too.
_OUR_COLOR, _PEER_COLOR, _PLAIN_COLOR = "#0072B2", "#D55E00", "#777777"
_SIZE, _DPI, _PALETTE = (8.0, 3.3), 130, 32


def draw_overview(docs: Path) -> Path:
    """Draw ``assets/overview.png`` from ``evaluation/standard.csv`` and ``benchmarks/figures.csv`` in ``docs``.

    Raises:
        ValueError: if one of the files has not what is to be shown.
        OSError: if one is not there.
    """
    found = read_csv(docs / "evaluation" / "standard.csv")
    tokens, speedups = read_speedups(docs / "benchmarks" / "figures.csv")
    file = docs / "assets" / "overview.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    with settings(_DPI):
        drawn = figure(*_SIZE)
        left, right = drawn.subplots(1, 2, width_ratios=(1.15, 1))
        _quality(left, found)
        _speed(right, tokens, speedups)
        save(drawn, file)
    reduce_colors(file, _PALETTE)
    return file


def read_speedups(table: Path) -> tuple[int, dict[str, float]]:
    """The longest context of the model's benchmark, and the speedups over DynamicCache there.

    Raises:
        ValueError: if the file has no such rows.
    """
    with table.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("model") == _MODEL and row.get("speedup_dynamic")]
    if not rows:
        raise ValueError(f"path={str(table)!r} has no decoding speed of {_MODEL}")
    longest = max(int(row["tokens"]) for row in rows)
    return longest, {row["cache"]: float(row["speedup_dynamic"]) for row in rows if int(row["tokens"]) == longest}


def _quality(plot: Any, found: Comparison) -> None:
    """KL over bytes, with the rounding noise of bfloat16 as a line."""
    if not found.fidelity:
        raise ValueError("the standard suite's CSV file has no fidelity task")
    task = found.fidelity[-1]
    for names, color, marker in ((OURS, _OUR_COLOR, "o"), (PEERS, _PEER_COLOR, "s")):
        for cache, label in names.items():
            kl, memory = found.metric(cache, task.text, "kl"), found.memory(cache, task.text)
            if kl is None or memory is None:
                continue
            error = [[min(kl.stderr or 0.0, kl.value * 0.9)], [kl.stderr or 0.0]]
            plot.errorbar([memory.ratio_bf16], [kl.value], yerr=error, fmt=marker, color=color, markersize=6, capsize=2)
            dx, dy, side = _PLACES.get(cache, (7, 4, "left"))
            at = memory.ratio_bf16, kl.value
            plot.annotate(label, at, (dx, dy), textcoords="offset points", ha=side, color=color, fontsize=9)
    if (floor := found.metric(found.noise_floor or "", task.text, "kl")) is not None:
        plot.axhline(floor.value, color="black", linewidth=1, linestyle="--")
        plot.annotate(
            "rounding of the model in bfloat16", (0, floor.value), (3, -10), xycoords=("axes fraction", "data"),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    for y, text, color in ((0.42, "QuantizedKVCache", _OUR_COLOR), (0.34, "transformers' QuantizedCache", _PEER_COLOR)):
        plot.text(0.02, y, text, color=color, fontsize=8, weight="bold", transform=plot.transAxes)
    plot.set_yscale("log")
    plot.set_xlim(0.2, 0.72)
    plot.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f} %"))
    plot.set_xlabel("bytes held, of a bfloat16 DynamicCache")
    plot.set_ylabel("KL to the full cache, nats a token")
    plot.set_title(f"{_MODEL}, {task.length:,} tokens", loc="left")


def _speed(plot: Any, tokens: int, speedups: Mapping[str, float]) -> None:
    """Decoding speed of a whole model, as bars."""
    shown = [name for name in BARS if name in speedups]
    for row, name in enumerate(shown):
        color = _OUR_COLOR if name.startswith("ours") else _PEER_COLOR if "Quant" in BARS[name] else _PLAIN_COLOR
        plot.barh([row], [speedups[name]], height=0.7, color=color)
        plot.annotate(
            f"{speedups[name]:.2f} ×",
            (speedups[name], row),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    plot.set_yticks(range(len(shown)), [BARS[name] for name in shown])
    plot.set_ylim(len(shown) - 0.4, -0.6)
    plot.set_xlim(0, 1.22 * max(speedups[name] for name in shown))
    plot.axvline(1, color="black", linewidth=1, linestyle=":")
    plot.yaxis.set_minor_locator(NullLocator())
    plot.grid(axis="y", visible=False)
    plot.set_xlabel("decoding speed over DynamicCache")
    plot.set_title(f"Speed, {tokens:,} tokens", loc="left")
