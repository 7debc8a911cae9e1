"""``hf-kvcache explain``: why there is a cache at all, by the time of a token with none and with several."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hf_kvcache.cli.explain_timing import Measured, Stop, measure
from hf_kvcache.cli.models import DEFAULT_MODEL_NAME, MODEL_HELP, load_default_model, quiet_transformers
from hf_kvcache.cli.reading import check_context, check_picture
from hf_kvcache.cli.sample_text import packaged_text
from hf_kvcache.planning.caches import maker
from hf_kvcache.planning.sizes import parse_count
from hf_kvcache.utils.environment import machine, versions
from hf_kvcache.utils.validation import whole

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SHORTEST = 64


def add_explain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "explain",
        help="why there is a cache: time of a token and of a whole text without one and with several",
        description="The time of a token against the length of the text, and the time of the whole text, without a "
        "cache, with transformers' and with ours. Reading a prompt and decoding are timed apart. Lengths double from "
        f"{_SHORTEST} tokens on.",
    )
    parser.add_argument("--model", help=MODEL_HELP)
    parser.add_argument("--caches", default="full,quantized:4", help="with commas (default: %(default)s)")
    parser.add_argument("--limit", default="2k", help="longest text in tokens (default: %(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=120,
        metavar="S",
        help="no length is begun that would end later (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="repeats of a length (default: %(default)s)")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="fp32", help="of the model (default: %(default)s)")
    parser.add_argument("--device", help="default: cpu")
    parser.add_argument("--plot", metavar="FILE", help="write both curves as a picture")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.set_defaults(run=_run)


def lengths_up_to(limit: int) -> list[int]:
    """Numbers of tokens that double from 64 on, as far as ``limit``; at least one."""
    lengths = [min(_SHORTEST, limit)]
    while lengths[-1] * 2 <= limit:
        lengths.append(lengths[-1] * 2)
    return lengths


def _run(args: argparse.Namespace) -> int:
    lengths = lengths_up_to(parse_count("limit", args.limit))
    whole("rounds", args.rounds, 1)
    if not args.seconds > 0:
        raise ValueError(f"seconds={args.seconds!r}; accepted: a positive number")
    makers = {name: maker(name) for name in args.caches.split(",")}
    try:
        from hf_kvcache.cli import explain_display as display
    except ModuleNotFoundError as error:
        raise RuntimeError(f"explain needs the package {error.name}; install it with: pip install rich") from error
    if args.plot:
        check_picture("plot", args.plot)
    model, tokenizer = load_default_model(args.model, _DTYPES[args.dtype], args.device)
    check_context(model, lengths[-1] + 16, "lower --limit")
    ids = _text(tokenizer, lengths[-1]).to(model.device)
    found: list[Measured] = []
    interrupted = False
    with quiet_transformers(), display.progress(len(lengths) * args.rounds) as advance:
        try:
            for measured in measure(model, ids, makers, lengths, args.rounds, Stop(args.seconds), advance):
                found.append(measured)
        except KeyboardInterrupt:
            interrupted = True
    if found:
        print(as_json(found, args, model)) if args.json else display.show(found, lengths)
        if args.plot:
            display.draw(found, Path(args.plot), args.model or DEFAULT_MODEL_NAME)
    if interrupted:
        print("interrupted: what was measured before is shown", file=sys.stderr)
    return 130 if interrupted else 0


def _text(tokenizer: Any, length: int) -> torch.Tensor:
    """``length`` tokens of the packaged text, repeated if it is shorter, ``[1, length]``."""
    tokens = tokenizer(packaged_text()[0], add_special_tokens=False, verbose=False).input_ids
    repeats = -(-length // len(tokens))
    return torch.tensor([(tokens * repeats)[:length]], device="cpu")


def as_json(found: list[Measured], args: argparse.Namespace, model: Any) -> str:
    """What was measured as JSON, with the machine."""
    rows = [asdict(row) for row in found]
    what = {
        "model": Path(args.model).name if args.model else DEFAULT_MODEL_NAME,
        "dtype": args.dtype,
        "machine": machine(str(model.device)),
        "versions": versions(),
    }
    return json.dumps(what | {"rows": rows}, indent=2)
