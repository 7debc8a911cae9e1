"""What packing takes of the processor: of a prompt, and of the decode step in which a page is full.

    python -m benchmarks.bench_pack [--quick] [--shapes 9/3/64 32/8/128] [--tokens 2048] [--layers 30]

Batch of 1, float32. A prompt is an update and what follows its attention: scale and mean of the keys,
packing, storing. Attention itself is left out, and so is making the cache. A step is an update and attention of one
token. Times are the CPU time of the process with all its threads, so that other processes count for little. The
fastest of the rounds is taken of the prompt, and the median step; a page is the median of the steps that pack one, less
a median step. That is one layer in a loop. In a model, where all layers pack at the same token and other work lies
between two of them, code and data are not in a core's caches. So ``--layers`` of them are stepped in turn, each behind
a product with a matrix of 2 MiB of its own; a pause is what the token takes more at which all of them pack, products
left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.methods import LLAMA_8B, SMOLLM2, PackedMethod, Shape, empty_method
from benchmarks.session import Report, Row, make_console, make_parser, pick, start
from benchmarks.sweep import sweep
from benchmarks.tables import show
from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.kernels.inputs import Scoring

METHODS = ("ours none", "ours 8-bit", "ours 4-bit", "ours 3-bit", "ours 2-bit")
_PAGE = 128


def cpu_ms(action: Callable[[], Any]) -> float:
    """Milliseconds of CPU time, of all threads of the process."""
    began = time.process_time_ns()
    action()
    return (time.process_time_ns() - began) / 1e6


def prefilled(
    name: str, shape: Shape, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor
) -> tuple[PackedMethod, float]:
    """A cache that has stored a prompt, and the CPU milliseconds of doing so."""
    method = empty_method(name, shape, keys.shape[2], keys)
    assert isinstance(method, PackedMethod)
    call = AttentionCall(query, None, Scoring(method.module.scaling))

    def store() -> None:
        method.cache.update(keys, values, 0)
        method.cache.layers[0].note_attended(call)

    return method, cpu_ms(store)


@torch.inference_mode()
def pause(name: str, shape: Shape, tokens: int, layers: int, pages: int) -> Row:
    """The row of so many layers that pack at the same token, ``pages`` times."""
    keys, values = shape.tokens(tokens)
    methods = [prefilled(name, shape, keys, values, shape.queries(tokens))[0] for _ in range(layers)]
    news = [(shape.queries(1), *shape.tokens(1), None) for _ in methods]
    weights, vector = torch.randn(layers, 512, 1024), torch.randn(1024)
    steps: list[float] = []
    packing: list[float] = []
    for _ in range(pages * _PAGE):
        before, took = methods[0].cache.memory().parts["codes"], 0.0
        for method, new, weight in zip(methods, news, weights, strict=True):
            torch.mv(weight, vector)
            took += cpu_ms(partial(method.step, *new))
        (packing if methods[0].cache.memory().parts["codes"] > before else steps).append(took)
    about = {"shape": str(shape), "tokens": tokens, "cache": name, "layers": layers}
    step = median(steps)
    return about | {"pause_ms": max(median(packing) - step, 0.0), "layers_step_ms": step}


@torch.inference_mode()
def measure(shape: Shape, tokens: int, rounds: int) -> list[Row]:
    """The rows of all methods for one shape and length of a prompt."""
    keys, values = shape.tokens(tokens)
    query, token = shape.queries(tokens), (shape.queries(1), *shape.tokens(1))
    methods: dict[str, PackedMethod] = {}
    prompts: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(rounds):
        for name in METHODS:
            methods[name], took = prefilled(name, shape, keys, values, query)
            prompts[name].append(took)
    rows = []
    for name, method in methods.items():
        steps: list[float] = []
        packing: list[float] = []
        for _ in range(rounds * _PAGE):
            before = method.cache.memory().parts["codes"]
            took = cpu_ms(lambda method=method: method.step(*token, None))  # type: ignore[misc]
            (packing if method.cache.memory().parts["codes"] > before else steps).append(took)
        step = median(steps)
        rows.append(
            {
                "shape": str(shape),
                "tokens": tokens,
                "cache": name,
                "prompt_ms": min(prompts[name]),
                "page_packing_ms": max(median(packing) - step, 0.0),
                "step_ms": step,
            }
        )
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", help="query heads/KV heads/head_dim; default: 9/3/64 32/8/128")
    parser.add_argument("--tokens", type=int, nargs="+", help="of the prompt; default: 2048")
    parser.add_argument("--rounds", type=int, help="prompts, and pages after each; default: 5")
    parser.add_argument("--layers", type=int, help="that pack at the same token, 0 to leave this out; default: 30")
    args = start(parser, argv)
    args.shapes = pick(args.shapes, args.quick, [str(SMOLLM2), str(LLAMA_8B)], [str(SMOLLM2)])
    args.tokens = pick(args.tokens, args.quick, [2048], [512])
    args.rounds = args.rounds or (1 if args.quick else 5)
    args.layers = (2 if args.quick else 30) if args.layers is None else args.layers
    return args


def main(argv: Sequence[str] | None = None) -> Any:
    args, console, report = parse(argv), make_console(), Report("bench_pack")
    report.note("CPU time of all threads; prompt: the fastest of the rounds; page: above a median step.")
    sweep(args, console, report, lambda shape, count: measure(shape, count, args.rounds))
    if args.layers:
        shape, tokens = Shape.parse(args.shapes[0]), min(args.tokens)
        rows = [pause(name, shape, tokens, args.layers, args.rounds) for name in METHODS]
        show(report.script, rows, console)
        report.rows += rows
    return report.finish(args, console)


if __name__ == "__main__":
    main()
