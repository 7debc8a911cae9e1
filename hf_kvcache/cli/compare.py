"""``hf-kvcache compare``: what caches cost on a text of one's own, in quality, bytes and time."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from hf_kvcache.cache.model_config import decoder_config
from hf_kvcache.cli.compare_measure import FULL, Compared, compare
from hf_kvcache.cli.compare_text import cut_windows, read_text
from hf_kvcache.cli.models import DEFAULT_MODEL_NAME, MODEL_HELP, load_default_model, quiet_transformers
from hf_kvcache.cli.reading import check_context, replace_file
from hf_kvcache.integration.binding import unbind
from hf_kvcache.planning.caches import maker
from hf_kvcache.planning.sizes import parse_count
from hf_kvcache.utils.environment import machine, versions
from hf_kvcache.utils.validation import whole

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_DEFAULT = "quantized:8,quantized:4,quantized:2,snapkv:0.25,snapkv:0.25+4bits,window:512"


def add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "compare",
        help="what caches cost on your own text: quality, bytes and time",
        description="Windows of a text are read and compressed by each cache, then the tokens that follow are decoded "
        "through it and compared with the full cache. Ctrl-C leaves what was measured: files are written after every "
        "window.",
    )
    parser.add_argument("--model", help=MODEL_HELP)
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text (default: two chapters that come with the package)")
    parser.add_argument(
        "--caches",
        default=_DEFAULT,
        help="with commas, named as in `plan`; full always runs (default: %(default)s)",
    )
    parser.add_argument("--prefix", default="1k", help="tokens read at once (default: %(default)s)")
    parser.add_argument("--suffix", default="128", help="tokens decoded behind them (default: %(default)s)")
    parser.add_argument(
        "--windows", type=int, default=4, metavar="N", help="at most, spread over the text (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="fp32", help="of the model (default: %(default)s)")
    parser.add_argument("--device", help="default: cpu")
    parser.add_argument("--plot", metavar="FILE", help="write a plot of quality against bytes")
    parser.add_argument("--html", metavar="FILE", help="write a page with table and plot that needs no network")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    prefix, suffix = parse_count("prefix", args.prefix), parse_count("suffix", args.suffix)
    for name, count in (("prefix", prefix), ("suffix", suffix)):
        whole(name, count, 2)
    whole("windows", args.windows, 1)
    makers = {name: maker(name) for name in args.caches.split(",") if name != FULL}
    try:
        from hf_kvcache.cli import compare_display as display
    except ModuleNotFoundError as error:
        raise RuntimeError(f"compare needs the package {error.name}; install it with: pip install rich") from error
    display.check_files(args.plot, args.html)
    text, text_name = read_text(args.text)
    model, tokenizer = load_default_model(args.model, _DTYPES[args.dtype], args.device)
    check_context(model, prefix + suffix, "lower --prefix or --suffix")
    windows = cut_windows(tokenizer, text, prefix, suffix, args.windows).to(model.device)
    for make in makers.values():  # a cache that the model cannot have is refused before anything is measured
        make(decoder_config(model.config))
    facts = _facts(args, model, text_name, windows, prefix)
    rows: dict[str, Compared] = {}
    interrupted = False
    with quiet_transformers(), display.progress(windows, prefix, len(makers) + 1) as advance:
        try:
            for row in compare(model, tokenizer, windows, prefix, makers, advance):
                rows[row.name] = row
                if row.name == (FULL, *makers)[-1]:  # all caches have read this window
                    _write(list(rows.values()), facts, args)
        except KeyboardInterrupt:
            interrupted = True
    unbind(decoder_config(model.config))
    return _end(list(rows.values()), facts, args, interrupted)


def _end(rows: Sequence[Compared], facts: dict[str, Any], args: argparse.Namespace, interrupted: bool) -> int:
    """Write and print what there is; returns the exit status."""
    from hf_kvcache.cli import compare_display as display

    if rows:
        if interrupted:
            _write(rows, facts, args)
        print(as_json(rows, facts)) if args.json else display.show(rows, facts)
    if interrupted:
        print("interrupted: what was measured before is shown", file=sys.stderr)
    return 130 if interrupted else 0


def _facts(args: argparse.Namespace, model: Any, text_name: str, windows: torch.Tensor, prefix: int) -> dict[str, Any]:
    """What was measured, and where; no paths."""
    return {
        "model": Path(args.model).name if args.model else DEFAULT_MODEL_NAME,
        "dtype": args.dtype,
        "text": text_name,
        "windows": len(windows),
        "prefix": prefix,
        "suffix": windows.shape[1] - prefix,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(str(model.device)),
        "versions": versions(),
    }


def _write(rows: Sequence[Compared], facts: dict[str, Any], args: argparse.Namespace) -> None:
    """Write the files that were asked for, each as a whole."""
    from hf_kvcache.cli.compare_page import page, picture

    if args.plot:
        replace_file(Path(args.plot), picture(rows, Path(args.plot).suffix.removeprefix(".") or "png"))
    if args.html:
        replace_file(Path(args.html), page(rows, facts).encode())


def as_json(rows: Sequence[Compared], facts: dict[str, Any]) -> str:
    """What was measured as JSON."""
    return json.dumps(facts | {"caches": [row.summary() for row in rows]}, indent=2)
