"""One decode step of one attention layer: a token is taken in, and its query attends to everything held.

    python -m benchmarks.bench_decode [--long] [--quick] [--shapes 32/8/128] [--tokens 4096 16384]

Batch of 1, float32 queries, random normal keys and values. All methods hold the same tokens in one process and take
turns (A B C, A B C, ...); medians over the rounds. Nothing is put back between the steps: every method grows by one
token a round, from 44 tokens past the nominal T to at most 92, so that our full-precision tail has the length that it
has on average. Our cache takes the last 512 of its first tokens one at a time, so that its pages lie in memory as they
do after decoding. In the rounds no page fills. Packing is timed apart (the step in which a page fills and the one
behind it, less two ordinary ones) and added, spread over the page's tokens. QuantizedCache's own flush requantizes all
tokens every 128; it is counted as the time of its first quantization, spread likewise. Every method is checked against
float64 attention before it is timed.

*page faults* are counted in one more step: a method that allocates anew waits there for the system to map memory.
With T = 64k and all methods this takes about 5 GB of memory, with ``--long`` 10 GB.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import exact
from benchmarks.methods import (
    CODECS,
    DENSE32,
    DYNAMIC,
    LLAMA_8B,
    PEERS,
    PLAIN,
    SMOLLM2,
    STATIC,
    CacheMethod,
    DenseMethod,
    Method,
    PackedMethod,
    Shape,
    UnavailableError,
    filled_method,
    try_peer,
)
from benchmarks.session import Report, Row, make_console, make_parser, pick, start
from benchmarks.tables import show
from benchmarks.timing import Clock, count_page_faults, cpu_clock, read_bandwidth, take_turns
from hf_kvcache.utils.environment import last_level_cache

#: Tokens past the nominal T at the start. T being a multiple of the page size (128), the tail then holds 164 tokens of
#: the 128 to 255 between which it moves, sinks apart, and no page fills within ``ROUNDS``.
OFFSET = 40
ROUNDS, LEAST_ROUNDS, WARM_UP = 48, 5, 3
_RESIDUAL = 128
METHODS = (DYNAMIC, STATIC, *PEERS, DENSE32, "dense bf16", *CODECS)


@dataclass
class Setting:
    """How long and with what to measure.

    Attributes:
        seconds: for the rounds of one shape and T.
        peer_tokens: the largest T at which the group-wise peers run: each of their steps decodes all tokens.
        clock: times an action.
        like: keys, values and queries are of its dtype and on its device.
        dense: the dense method with which the others are compared.
    """

    seconds: float
    peer_tokens: int
    clock: Clock = cpu_clock
    like: torch.Tensor = field(default_factory=lambda: PLAIN)
    dense: str = DENSE32


def make_methods(
    names: Sequence[str], shape: Shape, keys: torch.Tensor, values: torch.Tensor, setting: Setting, report: Report
) -> tuple[dict[str, Method], dict[str, float]]:
    """The methods that can run here, filled, and how many microseconds the filling took."""
    methods: dict[str, Method] = {}
    fill_us: dict[str, float] = {}
    query = shape.queries(1, keys)
    room = ROUNDS + WARM_UP + 2 + _RESIDUAL
    for name in names:
        if name in PEERS[:2] and keys.shape[2] - OFFSET > setting.peer_tokens:
            report.note(f"hqq and quanto are left out above {setting.peer_tokens:,} tokens (--peer-tokens).")
            continue

        def build(name: str = name) -> None:
            methods[name] = filled_method(name, shape, keys, values, query, room)

        try:
            if name in PEERS:
                try_peer(name, shape, keys)
            fill_us[name] = setting.clock(build)
        except UnavailableError as error:
            report.note(str(error))
    return methods, fill_us


def check_method(
    method: Method, shape: Shape, keys: torch.Tensor, values: torch.Tensor, token: tuple[torch.Tensor, ...]
) -> dict[str, float]:
    """Take in ``token`` and compare with float64; returns the errors as columns of a row."""
    query, key, value = token
    all_keys, all_values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    errors = {}
    if isinstance(method, PackedMethod):
        out, own_keys, own_values = method.step_and_decode(query, key, value)
        own = exact.attention(query, own_keys, own_values)
        tolerance = exact.OWN_TOLERANCE if keys.dtype == torch.float32 else exact.TOLERANCES["bf16"]
        errors["kernel_error"] = exact.check(method.name, exact.relative_error(out, own), tolerance)
    else:
        out = method.step(query, key, value, method.mask(1))
    error = exact.relative_error(out, exact.attention(query, all_keys, all_values))
    return errors | {"error": exact.check(method.name, error, exact.TOLERANCES[method.stored])}


def packing_us(method: CacheMethod, shape: Shape, like: torch.Tensor, step_us: float, clock: Clock) -> float:
    """Microseconds a token that our cache spends on packing: a page filled now, spread over its tokens."""
    size = method.cache.options.page_size
    missing = (
        size
        - (method.cache.get_seq_length() - method.cache.options.sink_length - method.cache.options.tail_length) % size
    )
    for _ in range(missing - 2):
        method.cache.update(*shape.tokens(1, like), 0)
    packed, times = method.cache.memory().packed_elements, []
    for _ in range(8):
        before = method.cache.memory().packed_elements
        times.append(clock(partial(method.step, shape.queries(1, like), *shape.tokens(1, like), None)))
        if before > packed:  # the step before this one packed: both are in
            return max(sum(times[-2:]) - 2 * step_us, 0.0) / size
    raise RuntimeError(f"{method.name}: no page was packed in {len(times)} steps")


@torch.inference_mode()
def measure(
    shape: Shape, tokens: int, names: Sequence[str], setting: Setting, bandwidth: float, report: Report
) -> list[Row]:
    """The rows of all methods for one shape and number of tokens."""
    torch.manual_seed(tokens)  # the errors are then the same in every run
    like = setting.like
    keys, values = shape.tokens(tokens + OFFSET, like)
    methods, fill_us = make_methods(names, shape, keys, values, setting, report)
    first = (shape.queries(1, like), *shape.tokens(1, like))
    rows: dict[str, Row] = {}
    for name, method in methods.items():
        if isinstance(method, DenseMethod):
            method.choose(first[0], setting.clock)
        rows[name] = {"shape": str(shape), "tokens": tokens, "cache": name, "attention": method.attention}
        rows[name] |= check_method(method, shape, keys, values, first)
        rows[name] |= {"bytes_read": method.bytes_read(), "bytes_held": method.bytes_held()}
    del keys, values

    def one_round(number: int) -> dict[str, float]:
        token = (shape.queries(1, like), *shape.tokens(1, like))
        return {name: setting.clock(partial(method.step, *token, method.mask(1))) for name, method in methods.items()}

    for number in range(WARM_UP):
        one_round(number)
    times = take_turns(one_round, ROUNDS, LEAST_ROUNDS, setting.seconds)
    token = (shape.queries(1, like), *shape.tokens(1, like))
    for name, method in methods.items():
        rows[name]["page_faults"] = count_page_faults(partial(method.step, *token, method.mask(1)))
    for name, method in methods.items():
        step = median(times[name])
        packing = 0.0
        if isinstance(method, PackedMethod):
            packing = packing_us(method, shape, like, step, setting.clock)
        elif name in PEERS[:2]:
            packing = fill_us[name] / _RESIDUAL
        rate = rows[name]["bytes_read"] / step / 1e3
        rows[name] |= {
            "rounds": len(times[name]),
            "step_us": step,
            "packing_us": packing,
            "total_us": step + packing,
            "gb_per_s": rate,
            "bandwidth_share": rate / bandwidth,
        }
    for row in rows.values():
        for label, other in (("dynamic", DYNAMIC), ("dense", setting.dense)):
            if other in rows:
                row[f"speedup_{label}"] = rows[other]["total_us"] / row["total_us"]
    return list(rows.values())


def show_bandwidth(rates: dict[str, float], size: int, report: Report) -> float:
    """Note the bandwidth by every way of reading; returns the largest, in GB/s."""
    best = max(rates, key=lambda way: rates[way])
    report.facts["read_bandwidth_gb_per_s"] = rates
    report.facts["read_buffer_bytes"] = size
    ways = ", ".join(f"{way} {rate:.1f}" for way, rate in rates.items())
    report.note(
        f"Read bandwidth {rates[best]:.1f} GB/s by {best}, over {size / 2**20:,.0f} MiB ({ways}). Where what is held "
        "fits in the last-level cache, a method may exceed it."
    )
    return rates[best]


def run(
    report: Report,
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    names: Sequence[str],
    setting: Setting,
    bandwidth: float,
    console: Console,
) -> None:
    """Measure and show every shape and number of tokens."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("decode", total=len(shapes) * len(tokens))
        for shape in shapes:
            for count in tokens:
                progress.update(task, description=f"decode {shape}, T = {count:,}")
                rows = measure(shape, count, names, setting, bandwidth, report)
                report.rows += rows
                show("bench_decode", rows, console)
                progress.advance(task)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", help="query heads/KV heads/head_dim; default: 32/8/128 9/3/64")
    parser.add_argument("--tokens", type=int, nargs="+", help="multiples of 128; default: 1024 4096 16384 65536")
    parser.add_argument("--long", action="store_true", help="also 131,072 tokens")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=", ".join(METHODS)
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="for the rounds of one shape and T, at most")
    parser.add_argument("--peer-tokens", type=int, default=16384, help="largest T at which hqq and quanto run")
    args = start(parser, argv)
    args.tokens = pick(args.tokens, args.quick, [1024, 4096, 16384, 65536], [1024, 4096])
    args.tokens += [131072] if args.long and 131072 not in args.tokens else []
    if bad := [count for count in args.tokens if count % 128 or count < 512]:
        parser.error(f"--tokens {bad[0]}: accepted: multiples of 128 from 512")
    args.shapes = pick(args.shapes, args.quick, [str(LLAMA_8B), str(SMOLLM2)], [str(SMOLLM2)])
    args.seconds = min(args.seconds, 2.0) if args.quick else args.seconds
    return args


def main(argv: Sequence[str] | None = None, read: Callable[..., dict[str, float]] = read_bandwidth) -> Any:
    args, console, report = parse(argv), make_console(), Report("bench_decode")
    # Its warning that the whole cache is decoded is about what the check does on purpose.
    logging.getLogger("hf_kvcache.layers.base").setLevel(logging.ERROR)
    size = 2**26 if args.quick else max(2**30, 4 * (last_level_cache() or 0))
    bandwidth = show_bandwidth(read(size), size, report)
    setting = Setting(args.seconds, args.peer_tokens)
    report.note(
        f"T grows by one token a round in every method, from {OFFSET + WARM_UP + 1} past the nominal T; nothing is "
        "reset."
    )
    run(report, [Shape.parse(s) for s in args.shapes], args.tokens, args.methods, setting, bandwidth, console)
    return report.finish(args, console)


if __name__ == "__main__":
    main()
