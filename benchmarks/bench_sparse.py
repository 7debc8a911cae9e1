"""One decode step of one attention layer that reads some of its pages, beside the same layer reading all of them.

    python -m benchmarks.bench_sparse [--quick] [--threads 1] [--codec unbiased4] [--selectors moments quest ...]

Batch of 1, float32 queries, random normal keys and values, in the same codec, with the same sinks, tail and pages. All
sides hold the same tokens in one process and take turns (A B C, A B C, ...); medians over the rounds. Every side grows
by one token a round. What a selector picks of random keys has no meaning; how long it takes does not depend on that.
Before it is timed, the output of each sparse side is compared with float64 attention over what it has picked.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.methods import LLAMA_8B, SMOLLM2, Shape
from benchmarks.session import Report, Row, make_console, make_parser, pick, start
from benchmarks.tables import show
from benchmarks.timing import Clock, cpu_clock, take_turns, thread_clock
from hf_kvcache import KVCache, SparseReadCache
from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.layers.sparse import SparseReads
from hf_kvcache.storage.dense_read import dense_side

TAIL, PAGE, SINKS = 64, 64, 4
#: Tokens held, and the share of them that a step reads.
CASES = [(32768, 0.25), (131072, 0.1)]
SMALL = [(1024, 0.5)]
ROUNDS, LEAST_ROUNDS, WARM_UP = 40, 5, 3
#: ``:across`` has KV heads share the pages.
SELECTORS = ["moments", "moments:across", "quest"]
_BLOCK = 4096
_FARTHEST = 2e-3


class Side:
    """A cache of one layer, filled with random tokens.

    Args:
        shape: the attention layer.
        cache: an empty cache for it.
        tokens: how many tokens it is to hold.
    """

    def __init__(self, shape: Shape, cache: KVCache, tokens: int) -> None:
        self.shape, self.cache = shape, cache
        torch.manual_seed(0)
        for begin in range(0, tokens, _BLOCK):
            keys, values = shape.tokens(min(_BLOCK, tokens - begin))
            self.cache.update(keys, values, 0)
            layer: Any = self.cache.layers[0]
            layer.note_attended(AttentionCall(None, None, Scoring(1.0), length=keys.shape[2]))

    def step(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Take in one token and attend to it and to what is read of the others."""
        self.cache.update(key, value, 0)
        layer: Any = self.cache.layers[0]
        with torch.inference_mode():
            return layer.attend(AttentionCall(query, None, Scoring(query.shape[3] ** -0.5)))

    def read(self) -> int:
        """Bytes that the latest step read."""
        return sum(self.cache.memory().read_last_step.values())


def check(side: Side) -> None:
    """Raise AssertionError unless a step's output is float64 attention over the tokens that it read."""
    query, key, value = side.shape.queries(1), *side.shape.tokens(1)
    output = side.step(query, key, value)
    layer: Any = side.cache.layers[0]
    storage, length = layer.storage, layer.get_seq_length()
    assert isinstance(layer, SparseReads)
    columns = layer.reader(storage).columns
    assert columns is not None
    keys, values = (dense_side(storage, name, 0, length)[0].double() for name in ("keys", "values"))
    packed = storage.table.columns * PAGE
    seen = torch.ones(side.shape.heads, length, dtype=torch.bool)
    seen[:, SINKS : SINKS + packed] = False
    for head in range(side.shape.heads):
        for column in columns[head].tolist():
            seen[head, SINKS + column * PAGE : SINKS + (column + 1) * PAGE] = True
    by_head = query[0, :, 0].double().unflatten(0, (side.shape.heads, -1))
    scores = (by_head @ keys.transpose(1, 2)) * side.shape.dim**-0.5
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    farthest = float((output[0, 0].double() - (weights @ values).flatten(0, 1)).abs().max())
    assert farthest < _FARTHEST, f"{layer!r} is {farthest} from float64"


def measure(
    shape: Shape, tokens: int, share: float, codec: str, selectors: Sequence[str], rounds: int, clock: Clock
) -> list[Row]:
    """The rows of one number of tokens."""
    config = shape.config()
    sizes: dict[str, Any] = {"tail_length": TAIL, "page_size": PAGE, "sink_length": SINKS}
    sides = {"all": Side(shape, KVCache(config, codec, **sizes), tokens)}
    for name in selectors:
        selector, _, across = name.partition(":")
        more = {"across": True} if across else {}
        cache = SparseReadCache(config, share, selector, codec=codec, dense_layers=0, **sizes, **more)
        sides[name] = Side(shape, cache, tokens)
        check(sides[name])

    def one_round(number: int) -> dict[str, float]:
        query, key, value = shape.queries(1), *shape.tokens(1)
        return {name: clock(partial(side.step, query, key, value)) for name, side in sides.items()}

    for number in range(WARM_UP):
        one_round(number)
    times = take_turns(one_round, rounds, LEAST_ROUNDS, 60.0)
    everything = sides["all"].read()
    return [
        {
            "shape": str(shape),
            "tokens": tokens,
            "budget": share,
            "codec": codec,
            "cache": name,
            "sparse_us": median(times[name]),
            "least_us": min(times[name]),
            "all_us": median(times["all"]),
            "least_all_us": min(times["all"]),
            "ratio": median(times["all"]) / median(times[name]),
            "bytes_read": side.read(),
            "share": side.read() / everything,
        }
        for name, side in sides.items()
        if name != "all"
    ]


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the benchmark; returns the path of its JSON file."""
    parser: argparse.ArgumentParser = make_parser(__doc__)
    parser.add_argument("--codec", default="unbiased4", help="how pages are stored; default: %(default)s")
    parser.add_argument("--selectors", nargs="+", default=SELECTORS, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU time of one thread in place of wall time, beside other work",
    )
    args = start(parser, argv)
    if args.cpu_time and torch.get_num_threads() > 1:
        parser.error("--cpu-time counts one thread; accepted with --threads 1")
    clock = thread_clock if args.cpu_time else cpu_clock
    report, console = Report("bench_sparse"), make_console()
    rounds = args.rounds or (LEAST_ROUNDS if args.quick else ROUNDS)
    for shape in pick(None, args.quick, [SMOLLM2, LLAMA_8B], [SMOLLM2]):
        for tokens, share in SMALL if args.quick else CASES:
            rows = measure(shape, tokens, share, args.codec, args.selectors, rounds, clock)
            report.rows += rows
    show(report.script, report.rows, console)
    if args.cpu_time:
        report.note("Times are CPU times of one thread.")
    report.note("The bytes read are those of pages, full-precision tokens and summaries, as memory() counts them.")
    return report.finish(args, console)


if __name__ == "__main__":
    main()
