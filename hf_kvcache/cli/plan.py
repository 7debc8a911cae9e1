"""``hf-kvcache plan``: will it fit, and what does it cost."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoConfig

from hf_kvcache.cli.models import check_model
from hf_kvcache.cli.reading import check_picture
from hf_kvcache.planning import Plan, plan
from hf_kvcache.planning.caches import DEFAULT, EXAMPLES
from hf_kvcache.planning.sizes import parse_count, show_bytes

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "plan",
        help="what the caches of a model hold at some length, from its config alone",
        description="What the caches of a model hold at some length, what fits beside its weights, and the least time "
        "of a decode step. Only the config is read, no weights.",
    )
    parser.add_argument("--model", required=True, help="hub id, folder, or a config's JSON file")
    parser.add_argument("--context", default="128k", help="tokens of each sequence (default: %(default)s, 131,072)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (default: %(default)s)")
    parser.add_argument("--memory", help="of the device, such as 80GB: says what fits beside the weights")
    parser.add_argument("--bandwidth", help="of the device, such as 3350GB/s: says the least time of a decode step")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), help="of weights, keys and values (default: the config's)")
    default, names = ",".join(DEFAULT), ", ".join(EXAMPLES)
    parser.add_argument(
        "--caches", default=default, help=f"names with commas between them: {names} (default: {default})"
    )
    parser.add_argument("--plot", metavar="FILE", help="write a plot of bytes against length")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    check_model(args.model)
    if args.plot:
        check_picture("plot", args.plot)
    config = AutoConfig.from_pretrained(args.model)
    context = parse_count("context", args.context)
    found = plan(
        config,
        context,
        args.batch,
        args.caches.split(","),
        _DTYPES.get(args.dtype),
        args.memory,
        args.bandwidth,
        sorted({max(context * part // 8, 1) for part in range(1, 9)}) if args.plot else (),
    )
    print(as_json(found) if args.json else as_text(found))
    if args.plot:
        _plot(found, Path(args.plot))
    return 0


def as_json(found: Plan) -> str:
    """A plan as JSON."""
    values = asdict(found) | {"dtype": str(found.dtype).removeprefix("torch.")}
    if found.textbook is not None:
        values["textbook"] |= {
            "dtype": values["dtype"],
            "bytes_per_token": found.textbook.bytes_per_token,
            "bytes": found.textbook.bytes(found.context, found.batch),
        }
    return json.dumps(values, indent=2)


def as_text(found: Plan) -> str:
    """A plan as tables for a terminal."""
    width = max(16, 2 + max((len(row.name) for row in found.caches), default=0))
    lines = [
        f"{found.model_type}, {found.parameters / 1e9:.2f} billion weights: {show_bytes(found.weight_bytes)}"
        + (f", of which a token reads {show_bytes(found.active_bytes)}" * (found.active_bytes < found.weight_bytes)),
        f"{found.batch} x {found.context:,} tokens, {str(found.dtype).removeprefix('torch.')}",
        "",
        f"{'cache':<{width}}{'bytes':>12}{'a token':>12}{'peak':>12}{'longest':>12}{'batch':>8}{'step, ms':>10}",
    ]
    for row in found.caches:
        longest = "" if row.longest_context is None else f"{row.longest_context:,}"
        largest = "" if row.largest_batch is None else f"{row.largest_batch:,}"
        floor = "" if row.step_floor_ms is None else f"{row.step_floor_ms:.2f}"
        size, token, peak = map(show_bytes, (row.bytes, row.bytes_per_token, row.peak))
        lines.append(f"{row.name:<{width}}{size:>12}{token:>12}{peak:>12}{longest:>12}{largest:>8}{floor:>10}")
    if any(row.peak > row.bytes for row in found.caches):
        lines += ["", "peak: the most held while the prompt is read in one forward pass; in chunks it is less"]
    lines += [f"{row.name}: {row.note}" for row in found.caches if row.note]
    if found.textbook is not None:
        total = show_bytes(found.textbook.bytes(found.context, found.batch))
        lines += ["", f"textbook: {found.textbook}, {total} in all"]
        if found.textbook.query_heads != found.textbook.kv_heads:
            lines.append(f"if every query head had keys: {found.textbook.bytes_per_token_unshared:,} bytes a token")
    return "\n".join([*lines, *(f"not told: {reason}" for reason in found.unknown)])


def _plot(found: Plan, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in found.caches:
        axes.plot(list(row.curve), [size / 2**30 for size in row.curve.values()], marker="o", label=row.name)
    axes.set(xlabel=f"tokens of each of {found.batch} sequences", ylabel="GiB", title=found.model_type)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=100)
