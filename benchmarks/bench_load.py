"""One decode step of one attention layer on an idle machine and beside busy processes, one for each core.

    python -m benchmarks.bench_load [--quick] [--shapes 32/8/128] [--tokens 4096] [--busy 2]

All methods hold the same tokens in one process and take turns, in an order that is drawn anew for every step. The
system gives a core to another process after some milliseconds; in a fixed order it would be the same method, again and
again, that meets this moment. Idle and busy spells alternate; the busy processes of a spell run an empty loop of
Python. Beside them a step takes either its own time or, where a thread of it has to wait for a core, some milliseconds
more. So the means are compared here, not the medians: a *slowdown* is the mean step beside busy processes over the mean
step without them. Threads that wait for others by spinning take the cores from those that work. So GNU's OpenMP, which
both torch and our kernels run on, is told not to spin (``GOMP_SPINCOUNT=0``), for all methods alike, unless the
variable is set already: ``GOMP_SPINCOUNT=30000000000`` is what it does without being told.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import mean
from typing import Any

import torch

from benchmarks.methods import DENSE32, LLAMA_8B, SMOLLM2, CacheMethod, DenseMethod, Method, Shape, filled_method
from benchmarks.session import Report, Row, make_console, make_parser, pick, start
from benchmarks.sweep import sweep
from benchmarks.timing import cpu_clock

METHODS = (DENSE32, "ours none", "ours 8-bit", "ours 4-bit")
SPIN = "GOMP_SPINCOUNT"
#: Tokens past the nominal T at the start: no page fills in the steps of a spell (`bench_decode` says more).
_OFFSET, _WARM_UP, _MOST_STEPS = 40, 3, 48
#: Ends by itself if the process that started it is gone.
_BUSY = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that do nothing but take a core's time."""
    running = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(processes)]
    time.sleep(0.3 if processes else 0.0)  # until they have begun
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def spell(
    methods: dict[str, Method], shape: Shape, steps: int, draw: random.Random, times: dict[str, list[float]]
) -> None:
    """Some steps of every method from where it stood first, in turns that are drawn anew for each step; their
    microseconds are added to ``times``.
    """
    for method in methods.values():
        if isinstance(method, CacheMethod):
            method.restore()
        elif isinstance(method, DenseMethod):
            method.length = method.keys.shape[2] - _MOST_STEPS - _WARM_UP
    for number in range(_WARM_UP + steps):
        token = (shape.queries(1), *shape.tokens(1))
        for name, method in draw.sample(list(methods.items()), len(methods)):
            taken = cpu_clock(partial(method.step, *token, method.mask(1)))
            if number >= _WARM_UP:
                times[name].append(taken)


@torch.inference_mode()
def measure(shape: Shape, tokens: int, args: argparse.Namespace) -> list[Row]:
    """The rows of all methods for one shape and number of tokens."""
    torch.manual_seed(tokens)
    keys, values = shape.tokens(tokens + _OFFSET)
    room = _MOST_STEPS + _WARM_UP
    methods = {name: filled_method(name, shape, keys, values, shape.queries(1), room) for name in METHODS}
    for method in methods.values():
        if isinstance(method, DenseMethod):
            method.choose(shape.queries(1), cpu_clock)
        elif isinstance(method, CacheMethod):
            method.keep()
    times: dict[bool, dict[str, list[float]]] = {loaded: {name: [] for name in METHODS} for loaded in (False, True)}
    draw = random.Random(tokens)
    for _ in range(args.spells):
        for loaded in (False, True):
            with busy(args.busy if loaded else 0):
                spell(methods, shape, args.steps, draw, times[loaded])
    idle, beside = ({name: mean(found) for name, found in times[loaded].items()} for loaded in (False, True))
    return [
        {
            "shape": str(shape),
            "tokens": tokens,
            "cache": name,
            "attention": methods[name].attention,
            "idle_us": idle[name],
            "beside_us": beside[name],
            "slowdown": beside[name] / idle[name],
            "slowdown_of_dense": beside[name] / idle[name] / (beside[DENSE32] / idle[DENSE32]),
        }
        for name in METHODS
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", help="query heads/KV heads/head_dim; default: 32/8/128 9/3/64")
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens held; default: 4096 16384")
    parser.add_argument("--busy", type=int, default=os.cpu_count(), help="busy processes; default: one for each core")
    parser.add_argument("--spells", type=int, default=4, help="idle and busy ones each; default: %(default)s")
    parser.add_argument("--steps", type=int, default=_MOST_STEPS, help="of each spell; default: %(default)s")
    args = start(parser, argv)
    args.shapes = pick(args.shapes, args.quick, [str(LLAMA_8B), str(SMOLLM2)], [str(SMOLLM2)])
    args.tokens = pick(args.tokens, args.quick, [4096, 16384], [1024])
    if args.busy < 1 or args.spells < 1:
        parser.error(f"--busy {args.busy} --spells {args.spells}: accepted: 1 or more")
    if not 1 <= args.steps <= _MOST_STEPS:
        parser.error(f"--steps {args.steps}: accepted: 1 to {_MOST_STEPS}")
    return args


def main(argv: Sequence[str] | None = None) -> Any:
    args, console, report = parse(argv), make_console(), Report("bench_load")
    report.note(f"{args.busy} busy processes in the busy spells. {SPIN}={os.environ.get(SPIN, 'not set')}.")
    sweep(args, console, report, partial(measure, args=args))
    return report.finish(args, console)


if __name__ == "__main__":
    if SPIN not in os.environ:  # OpenMP reads it when it is loaded
        again = [sys.executable, "-m", "benchmarks.bench_load", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, SPIN: "0"})
    main()
