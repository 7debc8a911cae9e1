"""The tables of every benchmark: which columns a row of figures has, and how they are written.

A script prints them when it has measured; ``benchmarks.report`` writes the same tables into the documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
Writer = Callable[[Any], str]


def _digits(count: int, scale: float = 1.0) -> Writer:
    return lambda value: f"{value * scale:,.{count}f}"


def _percent(value: float) -> str:
    return f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def _times(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _short(value: float) -> str:
    return f"{value:.1e}" if value else "0"


_MIB, _MB = _digits(2, 2**-20), _digits(2, 1e-6)
_WHOLE, _TENTHS = _digits(0), _digits(1)


@dataclass(frozen=True)
class View:
    """One kind of table.

    Attributes:
        script: whose rows it shows.
        title: what was measured, with the fields of ``by`` to be filled in.
        by: columns whose every combination of values gets a table of its own.
        needed: a column without which a row belongs to another table.
        columns: title and way of writing of each column of figures.
        keys: what a row is about, the first columns.
        where: values that a row must have.
        by_isa: the columns that are compared between instruction sets; empty if none are.
    """

    script: str
    title: str
    by: tuple[str, ...]
    needed: str
    columns: dict[str, tuple[str, Writer]]
    keys: tuple[str, ...] = ("tokens", "cache")
    where: Row = field(default_factory=dict, hash=False)
    by_isa: tuple[str, ...] = ()

    def groups(self, rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
        """Title and rows of each table."""
        found: dict[str, list[Row]] = {}
        for row in rows:
            if self.needed in row and all(row.get(name) == value for name, value in self.where.items()):
                found.setdefault(self.title.format(**{name: row[name] for name in self.by}), []).append(row)
        return list(found.items())

    def lines(self, rows: Sequence[Row]) -> list[list[str]]:
        """The header and a line for each row, without columns that no row has."""
        shown = [name for name in self.columns if any(row.get(name) not in (None, "") for row in rows)]
        lines = [[*self.keys, *(self.columns[name][0] for name in shown)]]
        for row in rows:
            keys = self._keys_of(row)
            if row.get("attention"):
                keys[-1] += f" ({row['attention']})"
            lines.append([*keys, *(self.columns[name][1](row[name]) if name in row else "–" for name in shown)])
        return lines

    def compared(self, results: Mapping[str, Sequence[Row]]) -> list[tuple[str, list[list[str]]]]:
        """Tables with a column for each instruction set, of its ``by_isa``.

        Args:
            results: the rows that were measured with each instruction set, by its name.

        Returns:
            Title of each table, and its lines, the header first.
        """
        tables: dict[str, dict[tuple[str, ...], dict[str, Row]]] = {}
        for isa, rows in results.items():
            for title, own in self.groups(rows) if self.by_isa else ():
                for row in own:
                    tables.setdefault(title, {}).setdefault(tuple(self._keys_of(row)), {})[isa] = row
        cells = [(name, isa) for name in self.by_isa for isa in results]
        header = [*self.keys, *(f"{self.columns[name][0]}, {isa}" for name, isa in cells)]
        found = []
        for title, by_keys in tables.items():
            lines = [header]
            for keys, by_isa in by_keys.items():
                values = [by_isa.get(isa, {}).get(name) for name, isa in cells]
                written = (
                    "–" if value is None else self.columns[name][1](value)
                    for value, (name, _) in zip(values, cells, strict=True)
                )
                lines.append([*keys, *written])
            found.append((title, lines))
        return found

    def _keys_of(self, row: Row) -> list[str]:
        return [f"{row[key]:,}" if isinstance(row[key], int) else str(row[key]) for key in self.keys]


_SPEEDUP = ("× DynamicCache", _times)
_ERROR = ("error", _short)
_SHAPE = "{shape} (query heads/KV heads/head_dim)"
_PREFILL = {"ms": ("ms", _TENTHS), "time_over_dynamic": ("over DynamicCache", _times), "error": _ERROR}
_EVICTING = {"ms": ("ms", _TENTHS), "evicting_ms": ("of it evicting", _digits(2)), "share": ("of the rest", _percent)}

VIEWS = (
    View(
        "bench_decode",
        f"Decode step, one layer, {_SHAPE}",
        ("shape",),
        "total_us",
        {
            "total_us": ("µs", _WHOLE),
            "step_us": ("step µs", _WHOLE),
            "packing_us": ("packing µs", _WHOLE),
            "speedup_dynamic": _SPEEDUP,
            "speedup_dense": ("× dense", _times),
            "bytes_read": ("MB to read", _MB),
            "bytes_held": ("MB held", _MB),
            "gb_per_s": ("GB/s", _TENTHS),
            "bandwidth_share": ("of bandwidth", _percent),
            "page_faults": ("page faults", _WHOLE),
            "error": _ERROR,
        },
        by_isa=("total_us", "speedup_dynamic", "speedup_dense"),
    ),
    View(
        "bench_load",
        f"Decode step beside busy processes, one layer, {_SHAPE}",
        ("shape",),
        "slowdown",
        {
            "idle_us": ("idle µs", _WHOLE),
            "beside_us": ("beside them µs", _WHOLE),
            "slowdown": ("slowdown", _times),
            "slowdown_of_dense": ("over that of dense", _times),
        },
        by_isa=("beside_us", "slowdown_of_dense"),
    ),
    View(
        "bench_prefill",
        f"Prefill, a chunk of {{new_tokens}} tokens over those held, one layer, {_SHAPE}",
        ("new_tokens", "shape"),
        "ms",
        _PREFILL,
        where={"kind": "chunk"},
        by_isa=("ms", "time_over_dynamic"),
    ),
    View(
        "bench_prefill",
        f"Prefill, the first tokens, one layer, {_SHAPE}",
        ("shape",),
        "ms",
        _PREFILL,
        where={"kind": "first"},
        by_isa=("time_over_dynamic",),
    ),
    View(
        "bench_append",
        f"Append of one token, one layer, {_SHAPE}",
        ("shape",),
        "append_us",
        {
            "append_us": ("µs with packing", _TENTHS),
            "speedup_dynamic": _SPEEDUP,
            "median_call_us": ("median call µs", _TENTHS),
            "slowest_call_us": ("slowest call µs", _TENTHS),
            "append_allocations": ("allocations", _WHOLE),
            "append_allocated_bytes": ("bytes allocated", _WHOLE),
            "step_allocations": ("allocations with attention", _WHOLE),
            "step_allocated_bytes": ("bytes with attention", _WHOLE),
        },
        by_isa=("append_us",),
    ),
    View(
        "bench_pack",
        f"Packing, CPU time, one layer, {_SHAPE}",
        ("shape",),
        "prompt_ms",
        {
            "prompt_ms": ("prompt ms", _digits(2)),
            "page_packing_ms": ("page ms", _digits(3)),
            "step_ms": ("step ms", _digits(3)),
        },
        by_isa=("prompt_ms", "page_packing_ms"),
    ),
    View(
        "bench_pack",
        f"The token at which {{layers}} layers pack a page, CPU time, {_SHAPE}",
        ("layers", "shape"),
        "pause_ms",
        {"pause_ms": ("pause ms", _digits(2)), "layers_step_ms": ("step ms, all layers", _digits(2))},
        by_isa=("pause_ms",),
    ),
    View(
        "bench_sparse",
        f"Decode step that reads {{budget:.0%}} of the tokens, one layer, {_SHAPE}, {{codec}}",
        ("shape", "budget", "codec"),
        "sparse_us",
        {
            "sparse_us": ("µs", _WHOLE),
            "all_us": ("reading all, µs", _WHOLE),
            "ratio": ("× as fast", _times),
            "bytes_read": ("MB read", _MB),
            "share": ("of all bytes", _percent),
        },
        by_isa=("sparse_us", "ratio"),
    ),
    View(
        "bench_batch",
        "Decode step of a batch, {what}",
        ("what",),
        "batch_us",
        {
            "batch_us": ("µs", _WHOLE),
            "over_plain": ("over no padding", _times),
            "reorder_us": ("exchange of beams, µs", _WHOLE),
            "mask_us": ("reading the mask, µs", _WHOLE),
        },
        keys=("tokens", "cache", "batch_of"),
        by_isa=("batch_us", "over_plain"),
    ),
    View(
        "bench_prompts",
        "Time to the first token behind a stored prefix of {prefix} tokens",
        ("prefix",),
        "memory_share",
        {
            "first_ms": ("first request ms", _WHOLE),
            "memory_ms": ("from memory ms", _WHOLE),
            "memory_share": ("of the first", _digits(3)),
            "disk_ms": ("from disk, new process, ms", _WHOLE),
            "disk_share": ("of the first", _digits(3)),
            "prefix_bytes": ("prefix MiB", _MIB),
            "file_bytes": ("file MiB", _MIB),
            "bytes_of_8": ("8 requests MiB", _MIB),
            "share_of_8": ("of one and 8 tails", _digits(3)),
            "zstd_share": ("zstd, share of the file", _digits(3)),
            "zstd_ms": ("zstd ms", _WHOLE),
            "unzstd_ms": ("back ms", _WHOLE),
        },
        keys=("cache",),
    ),
    View(
        "bench_assisted",
        "Taking drafts back, two layers in SmolLM2-135M's shape",
        (),
        "pass_us",
        {
            "step_us": ("plain step µs", _WHOLE),
            "pass_us": ("pass over a draft of 8 µs", _WHOLE),
            "crop_0_us": ("crop, none accepted, µs", _WHOLE),
            "crop_4_us": ("4 accepted", _WHOLE),
            "crop_8_us": ("8 accepted", _WHOLE),
        },
    ),
    View(
        "bench_assisted",
        "Decoding with drafts behind {prompt} tokens",
        ("prompt",),
        "tokens_per_s",
        {
            "passes": ("passes", _WHOLE),
            "tokens_per_pass": ("tokens a pass", _digits(2)),
            "tokens_per_s": ("tokens/s", _digits(1)),
            "over_no_drafts": ("over no drafts", _times),
            "cpu_ms_per_token": ("CPU ms a token", _WHOLE),
            "same_share": ("same tokens", _percent),
        },
        keys=("cache", "drafts"),
    ),
    View(
        "bench_memory",
        f"Bytes held, one layer, {_SHAPE}",
        ("shape",),
        "of_fp32",
        {
            "bytes_held": ("MiB", _MIB),
            "of_bf16": ("of bfloat16", _digits(3)),
            "of_fp32": ("of float32", _digits(3)),
            "bits_per_packed_element": ("bits per packed element", _digits(3)),
        },
    ),
    View(
        "bench_model",
        "Decoding, {model}",
        ("model",),
        "ms",
        {
            "ms": ("ms per token", _TENTHS),
            "packing_ms": ("of it packing", _digits(2)),
            "speedup_dynamic": _SPEEDUP,
            "bytes_held": ("MiB held", _digits(1, 2**-20)),
            "mean_kl": ("mean KL", _short),
            "top1_agreement": ("top-1", _digits(3)),
        },
        by_isa=("ms", "speedup_dynamic"),
    ),
    View(
        "bench_model",
        "Prefill, {model}",
        ("model",),
        "prefill_ms",
        {"prefill_ms": ("ms", _WHOLE), "prefill_over_dynamic": ("over DynamicCache", _digits(3))},
        by_isa=("prefill_over_dynamic",),
    ),
    View("bench_eviction", "Evicting in a prefill", (), "ms", _EVICTING, ("tokens", "policy"), {"part": "prefill"}),
    View("bench_eviction", "Evicting in decoding", (), "ms", _EVICTING, ("tokens", "policy"), {"part": "decoding"}),
    View(
        "bench_eviction",
        "Most bytes in a prefill in chunks",
        (),
        "peak_bytes",
        {
            "peak_bytes": ("MiB at most", _digits(1, 2**-20)),
            "held_bytes": ("MiB held", _digits(1, 2**-20)),
            "full_bytes": ("MiB of the full cache", _digits(1, 2**-20)),
            "share": ("most of the full cache", _digits(3)),
        },
        ("tokens", "policy"),
    ),
    View(
        "bench_eviction",
        "Generation without end",
        (),
        "first_us",
        {
            "first_us": ("µs a token at first", _WHOLE),
            "last_us": ("at last", _WHOLE),
            "ratio": ("ratio", _digits(3)),
            "first_bytes": ("bytes at first", _WHOLE),
            "last_bytes": ("at last", _WHOLE),
        },
        ("tokens", "policy"),
    ),
    View(
        "bench_latent",
        "Decode step of latent attention, {shape} (heads/latent + rotary width, dtype)",
        ("shape",),
        "layer_us",
        {
            "step_us": ("step µs", _WHOLE),
            "step_speedup": ("step ×", _times),
            "layer_us": ("layer µs", _WHOLE),
            "layer_speedup": ("layer ×", _times),
            "bytes_held": ("MB held", _MB),
            "of_bf16": ("of bfloat16 latents", _digits(3)),
            "bandwidth_share": ("of bandwidth", _percent),
            "error": _ERROR,
        },
        by_isa=("step_us", "step_speedup"),
    ),
    View(
        "bench_latent",
        "Decode step with an indexer that picks {picked} tokens, {shape} (heads/latent + rotary width, dtype)",
        ("picked", "shape"),
        "picked_step_us",
        {
            "all_step_us": ("step µs, all read", _WHOLE),
            "picked_step_us": ("the picked read", _WHOLE),
            "picked_step_speedup": ("step ×", _times),
            "all_layer_us": ("layer µs, all read", _WHOLE),
            "picked_layer_us": ("the picked read ", _WHOLE),
            "picked_layer_speedup": ("layer ×", _times),
            "bytes_held": ("MB held", _MB),
            "error": _ERROR,
        },
    ),
)


def views(script: str) -> list[View]:
    """The tables of a script."""
    return [view for view in VIEWS if view.script == script]


def show(script: str, rows: Sequence[Row], console: Console) -> None:
    """Print the tables that ``rows`` of a script fill."""
    for view in views(script):
        for title, own in view.groups(rows):
            header, *lines = view.lines(own)
            table = make_table(title, header)
            for line in lines:
                table.add_row(*line)
            console.print(table)


def show_compared(script: str, results: Mapping[str, Sequence[Row]], console: Console) -> None:
    """Print the tables with a column for each instruction set, of rows by their instruction set."""
    for view in views(script):
        for title, (header, *lines) in view.compared(results):
            table = make_table(title, header)
            for line in lines:
                table.add_row(*line)
            console.print(table)


def make_table(title: str, columns: Sequence[str]) -> Table:
    """A table with its numbers to the right."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in ("cache", "policy", "script") else "right")
    return table
