"""Plots of the JSON files: ``python -m benchmarks.plots results/benchmarks/*.json`` draws them again."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_MARKERS = "osD^v<>PX*"


def draw(path: Path) -> str:
    """Draw the plots of a JSON file beside it; returns what was done, as a sentence."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no plots: matplotlib is not installed (pip install matplotlib)"
    files = pictures(json.loads(path.read_text(encoding="utf-8")), path)
    return "drew " + ", ".join(str(file) for file in files) if files else "no plots for this one"


def pictures(result: Row, path: Path, dpi: int = 120) -> list[Path]:
    """Draw the plots of a result beside ``path``, whose stem their names begin with; returns the files."""
    import matplotlib

    with matplotlib.rc_context({"figure.dpi": dpi}):
        return [file for drawer in DRAWERS.get(result["script"], ()) for file in drawer(result, path)]


def _lines(
    result: Row,
    path: Path,
    column: str,
    label: str,
    *,
    log: bool = True,
    scale: float = 1.0,
    best: float | None = None,
    shapes: str = "query heads/KV heads/head_dim",
) -> Iterator[Path]:
    """One plot a shape of ``column`` against the tokens, a line for each cache."""
    for shape in dict.fromkeys(row["shape"] for row in result["rows"]):
        figure, axes = _figure(f"{result['script']}, {shape} ({shapes})", result)
        own = (row for row in result["rows"] if row["shape"] == shape and column in row)
        for style, (cache, rows) in _styled(_by_cache(own)):
            axes.plot([r["tokens"] for r in rows], [r[column] * scale for r in rows], label=cache, **style)
        if best is not None:
            axes.axhline(best, color="black", linewidth=0.8, linestyle=":")
        ticks = sorted({row["tokens"] for row in result["rows"]})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{count / 1024:g}k" for count in ticks])
        if log:
            axes.set_yscale("log")
        axes.set_xlabel("tokens held")
        axes.set_ylabel(label)
        name = re.sub(r"[^\w.]+", "_", shape.replace("/", "x"))
        yield _save(figure, axes, path, f"{column}_{name}")


def _decode(result: Row, path: Path) -> Iterator[Path]:
    yield from _lines(result, path, "total_us", "µs per decode step, one layer")
    yield from _lines(result, path, "bandwidth_share", "share of the measured read bandwidth", log=False, best=1.0)


def _prefill(result: Row, path: Path) -> Iterator[Path]:
    for kind in dict.fromkeys(row["kind"] for row in result["rows"]):
        part = result | {"rows": [r for r in result["rows"] if r["kind"] == kind], "script": f"prefill, {kind}"}
        yield from _lines(part, path.with_stem(f"{path.stem}_{kind}"), "ms", "ms, one layer")


def _append(result: Row, path: Path) -> Iterator[Path]:
    yield from _lines(result, path, "append_us", "µs per token appended, one layer")


def _memory(result: Row, path: Path) -> Iterator[Path]:
    yield from _lines(result, path, "bytes_held", "MiB held, one layer", scale=2**-20)
    yield from _lines(result, path, "of_bf16", "bytes held over those of a bfloat16 DynamicCache", log=False)


def _model(result: Row, path: Path) -> Iterator[Path]:
    import numpy as np

    rows = [row for row in result["rows"] if "ms" in row]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        contexts, caches = (list(dict.fromkeys(row[key] for row in own)) for key in ("tokens", "cache"))
        figure, axes = _figure(f"{model}: ms per token", result)
        width = 0.8 / len(caches)
        for index, cache in enumerate(caches):
            found = {row["tokens"]: row["ms"] for row in own if row["cache"] == cache}
            heights = [found.get(count, 0.0) for count in contexts]
            axes.bar(np.arange(len(contexts)) + index * width, heights, width, label=cache)
        axes.set_xticks(np.arange(len(contexts)) + 0.4 - width / 2, [f"{count:,}" for count in contexts])
        axes.set_xlabel("tokens of context")
        axes.set_ylabel("ms per token")
        yield _save(figure, axes, path, "".join(c if c.isalnum() else "_" for c in model))


def _latent(result: Row, path: Path) -> Iterator[Path]:
    shapes = "heads/latent + rotary width, dtype"
    yield from _lines(result, path, "step_us", "µs per decode step of latent attention", shapes=shapes)


def _by_cache(rows: Iterator[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["cache"], []).append(row)
    return found


def _styled(lines: dict[str, list[Row]]) -> Iterator[tuple[Row, tuple[str, list[Row]]]]:
    """Ours are colored full lines, the others gray dashed ones that their markers tell apart."""
    for index, item in enumerate(lines.items()):
        ours = item[0].startswith("ours")
        style = {"linestyle": "-" if ours else "--", "marker": _MARKERS[index % len(_MARKERS)], "markersize": 5}
        yield style | ({} if ours else {"color": "0.45", "linewidth": 1.0}), item


def _figure(title: str, result: Row) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    machine = result["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    axes.set_title(f"{title}\n{where}", fontsize=10)
    axes.grid(True, which="major", alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path, suffix: str) -> Path:
    from matplotlib import pyplot

    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    file = path.with_name(f"{path.stem}_{suffix}.png")
    figure.savefig(file, dpi="figure")
    pyplot.close(figure)
    return file


DRAWERS: dict[str, tuple[Callable[[Row, Path], Iterator[Path]], ...]] = {
    "bench_decode": (_decode,),
    "bench_prefill": (_prefill,),
    "bench_append": (_append,),
    "bench_memory": (_memory,),
    "bench_model": (_model,),
    "bench_latent": (_latent,),
}

if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(draw(Path(name)))
