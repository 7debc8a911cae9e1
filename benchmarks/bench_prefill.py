"""Prefill in one attention layer: a chunk of new tokens over the tokens held, and the first tokens of all.

    python -m benchmarks.bench_prefill [--quick] [--chunk 2 16 512] [--tokens 4096 16384] [--first 1024 4096]

``update`` and attention, batch of 1, float32. *chunk*: 512 new tokens over T held ones, with the causal mask that a
model makes (once for all its layers; it is not timed). Before every round each method goes back to its T tokens: the
transformers caches get back the tensors they had, ours is a fork of the cache that holds them (pages are shared, the
full-precision tail is copied), whose last 512 tokens came in chunks too. Behind a chunk of fewer tokens than a page,
T is 40 tokens more, so that no page fills. *first*: T tokens into an empty cache. Methods take turns; medians. Each
method's output is checked against float64 attention (chunk) or against DynamicCache's (first) before it is timed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import exact
from benchmarks.methods import (
    DYNAMIC,
    LLAMA_8B,
    PEERS,
    PLAIN,
    SMOLLM2,
    STATIC,
    CacheMethod,
    Shape,
    UnavailableError,
    empty_method,
    try_peer,
)
from benchmarks.session import Report, Row, make_console, make_parser, pick, start
from benchmarks.tables import show
from benchmarks.timing import Clock, cpu_clock, take_turns, thread_clock

METHODS = (DYNAMIC, STATIC, PEERS[0], PEERS[2], "ours none", "ours 8-bit", "ours 4-bit", "ours 2-bit")
_LEAST_ROUNDS = 3
#: Tokens of a page, and how many more are held behind a chunk of fewer.
_PAGE, _OFFSET = 128, 40
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def available(names: Sequence[str], shape: Shape, like: torch.Tensor, report: Report) -> list[str]:
    """Those of the methods that can run here; peers are tried."""
    found = []
    for name in names:
        try:
            if name in PEERS:
                try_peer(name, shape, like)
            found.append(name)
        except UnavailableError as error:
            report.note(str(error))
    return found


def inputs(shape: Shape, count: int, like: torch.Tensor) -> Inputs:
    """Query, key and value of ``count`` new tokens."""
    return shape.queries(count, like), *shape.tokens(count, like)


@torch.inference_mode()
def measure_chunk(
    shape: Shape,
    tokens: int,
    chunk: int,
    names: Sequence[str],
    like: torch.Tensor,
    clock: Clock,
    args: argparse.Namespace,
) -> list[Row]:
    """The rows of a chunk of ``chunk`` tokens over ``tokens`` held ones."""
    torch.manual_seed(tokens)
    tokens += _OFFSET if chunk < _PAGE else 0
    keys, values = shape.tokens(tokens, like)
    new = inputs(shape, chunk, like)
    expected = exact.attention(new[0], torch.cat([keys, new[1]], 2), torch.cat([values, new[2]], 2))
    methods: dict[str, CacheMethod] = {}
    masks, errors = {}, {}
    for name in names:
        method = methods[name] = empty_method(name, shape, tokens + chunk, like)
        method.fill(keys, values, shape.queries(1, like), chunk)
        method.keep()
        method.restore()
        masks[name] = method.mask(chunk)
        error = exact.relative_error(method.step(*new, masks[name]), expected)
        errors[name] = exact.check(name, error, exact.TOLERANCES[method.stored])

    def one_round(number: int) -> dict[str, float]:
        times = {}
        for name, method in methods.items():
            method.restore()
            times[name] = clock(partial(method.step, *new, masks[name]))
        return times

    times = take_turns(one_round, args.rounds, min(args.rounds, _LEAST_ROUNDS), args.seconds)
    return _rows("chunk", shape, tokens, chunk, times, errors)


@torch.inference_mode()
def measure_first(
    shape: Shape, tokens: int, names: Sequence[str], like: torch.Tensor, clock: Clock, args: argparse.Namespace
) -> list[Row]:
    """The rows of the first ``tokens`` tokens into an empty cache."""
    new = inputs(shape, tokens, like)

    def action(name: str) -> Callable[[], torch.Tensor]:
        method = empty_method(name, shape, tokens, like)
        return partial(method.step, *new, method.mask(tokens))

    expected = action(DYNAMIC)()
    tolerance = exact.TOLERANCES["fp32" if like.dtype == torch.float32 else "bf16"]
    errors = {name: exact.check(name, exact.relative_error(action(name)(), expected), tolerance) for name in names}

    def one_round(number: int) -> dict[str, float]:
        return {name: clock(action(name)) for name in names}

    times = take_turns(one_round, args.rounds, min(args.rounds, _LEAST_ROUNDS), args.seconds)
    return _rows("first", shape, tokens, tokens, times, errors)


def _rows(
    kind: str, shape: Shape, tokens: int, new: int, times: dict[str, list[float]], errors: dict[str, float]
) -> list[Row]:
    milliseconds = {name: median(values) / 1e3 for name, values in times.items()}
    return [
        {
            "kind": kind,
            "shape": str(shape),
            "tokens": tokens,
            "new_tokens": new,
            "cache": name,
            "ms": value,
            "time_over_dynamic": value / milliseconds[DYNAMIC],
            "error": errors[name],
            "rounds": len(times[name]),
        }
        for name, value in milliseconds.items()
    ]


def run(
    report: Report,
    args: argparse.Namespace,
    like: torch.Tensor,
    clock: Clock,
    console: Console,
) -> None:
    """Measure and show every shape, for tokens of the dtype and device of ``like``."""
    with Progress(console=console, transient=True) as progress:
        total = len(args.shapes) * (len(args.tokens) * len(args.chunk) + len(args.first))
        task = progress.add_task("prefill", total=total)
        for shape in map(Shape.parse, args.shapes):
            names = available(args.methods, shape, like, report)
            rows = []
            few = [name for name in names if name != PEERS[0]]
            if len(few) < len(names) and max([*args.tokens, *args.first]) > args.peer_tokens:
                report.note(f"hqq is left out above {args.peer_tokens:,} tokens (--peer-tokens).")
            for count, chunk in itertools.product(args.tokens, args.chunk):
                here = names if count <= args.peer_tokens else few
                rows += measure_chunk(shape, count, chunk, here, like, clock, args)
                progress.advance(task)
            for count in args.first:
                here = names if count <= args.peer_tokens else few
                rows += measure_first(shape, count, here, like, clock, args)
                progress.advance(task)
            show("bench_prefill", rows, console)
            report.rows += rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", help="query heads/KV heads/head_dim; default: 32/8/128 9/3/64")
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens held by the chunk; default: 1024 4096 16384")
    parser.add_argument("--first", type=int, nargs="+", help="tokens of the first prefill; default: 1024 4096")
    parser.add_argument("--chunk", type=int, nargs="+", help="new tokens; default: 2, 4, 8, 16 and 512")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help="default: all"
    )
    parser.add_argument("--cpu-time", action="store_true", help="count the time of the thread, not that of the clock")
    parser.add_argument("--rounds", type=int, help="rounds at most; default: 9")
    parser.add_argument("--seconds", type=float, default=6.0, help="for the rounds of one shape and T, at most")
    parser.add_argument("--peer-tokens", type=int, default=1024, help="largest T at which hqq runs")
    args = start(parser, argv)
    args.shapes = pick(args.shapes, args.quick, [str(LLAMA_8B), str(SMOLLM2)], [str(SMOLLM2)])
    args.tokens = pick(args.tokens, args.quick, [1024, 4096, 16384], [1024])
    args.first = pick(args.first, args.quick, [1024, 4096], [1024])
    args.chunk = pick(args.chunk, args.quick, [2, 4, 8, 16, 512], [4, 128])
    if args.cpu_time and torch.get_num_threads() > 1:
        parser.error("--cpu-time counts one thread; accepted with --threads 1")
    if DYNAMIC not in args.methods:
        parser.error(f"--methods: accepted: {DYNAMIC} and others, since all are compared with it")
    args.rounds = args.rounds or (3 if args.quick else 9)
    return args


def main(argv: Sequence[str] | None = None) -> Any:
    args, console, report = parse(argv), make_console(), Report("bench_prefill")
    run(report, args, PLAIN, thread_clock if args.cpu_time else cpu_clock, console)
    return report.finish(args, console)


if __name__ == "__main__":
    main()
