"""What it costs to take in one token, attention left out, against the number of tokens held.

    python -m benchmarks.bench_append [--quick] [--shapes 9/3/64] [--tokens 1024 65536]

One layer, batch of 1, float32. An append is ``cache.update`` with one token. Ours stores the token of one update at the
next, if no attention came between, so that the calls timed hold all of the work. DynamicCache copies all it holds at
every call. Methods take turns by blocks; a block of ours is as many calls as a page has tokens, so that it packs
exactly one page per head, and its mean is what a token costs with packing; the median of its single calls is a call
that does not pack. Every call adds a token: after five blocks ours holds 640 more, DynamicCache (16 calls a block) 80.
Allocations are counted by torch's dispatcher: every result whose memory is no argument's. What numpy and native kernels
allocate for themselves does not show there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.methods import DYNAMIC, SMOLLM2, CacheMethod, PackedMethod, Shape, filled_method
from benchmarks.session import Report, Row, make_console, make_parser, pick, start
from benchmarks.sweep import sweep
from benchmarks.timing import cpu_clock

METHODS = (DYNAMIC, "ours none", "ours 8-bit", "ours 4-bit", "ours 2-bit")
_PAGE = 128


class AllocationCounter(TorchDispatchMode):
    """Counts results of torch operations whose memory is no argument's, and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        known = set(_addresses((args, kwargs)))
        for address, size in _addresses(result).items():
            if address not in known and size:
                known.add(address)
                self.count, self.bytes = self.count + 1, self.bytes + size
        return result


def _addresses(values: Any) -> dict[int, int]:
    """Address and bytes of the storages behind the plain tensors in ``values``."""
    tensors = (leaf for leaf in tree_leaves(values) if type(leaf) is torch.Tensor)
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta")
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def count_allocations(method: CacheMethod, shape: Shape) -> Row:
    """Allocations of one append, and of one append with attention behind it, as columns of a row."""
    append, step = AllocationCounter(), AllocationCounter()
    torch.manual_seed(0)  # every method is to hold the same tokens
    key, value = shape.tokens(1)
    method.cache.update(key, value, 0)
    with append:
        method.cache.update(key, value, 0)
    method.step(shape.queries(1), key, value, None)
    query = shape.queries(1)
    with step:
        method.step(query, key, value, None)
    return {
        "append_allocations": append.count,
        "append_allocated_bytes": append.bytes,
        "step_allocations": step.count,
        "step_allocated_bytes": step.bytes,
    }


def check_same(methods: dict[str, CacheMethod], shape: Shape, tolerance: float = 2e-5) -> None:
    """Raise AssertionError unless our dense pages give what DynamicCache gives, after everything appended so far."""
    if DYNAMIC not in methods or "ours none" not in methods:
        return
    token = (shape.queries(1), *shape.tokens(1))
    expected, out = (methods[name].step(*token, None) for name in (DYNAMIC, "ours none"))
    error = ((out - expected).norm() / expected.norm()).item()
    if not error <= tolerance:
        raise AssertionError(f"outputs after appending differ: relative error {error:.2e}")


def appends(method: CacheMethod, shape: Shape, calls: int) -> Iterator[float]:
    """Microseconds of each of so many appends, on tokens made beforehand."""
    keys, values = shape.tokens(calls)
    for at in range(calls):
        yield cpu_clock(partial(method.cache.update, keys[:, :, at : at + 1], values[:, :, at : at + 1], 0))


@torch.inference_mode()
def measure(shape: Shape, tokens: int, names: Sequence[str], blocks: int, dynamic_calls: int) -> list[Row]:
    """The rows of all methods for one shape and number of tokens."""
    keys, values = shape.tokens(tokens)
    methods: dict[str, CacheMethod] = {}
    for name in names:
        method = filled_method(name, shape, keys, values, shape.queries(1), 0)
        assert isinstance(method, CacheMethod)
        methods[name] = method
    del keys, values
    allocations = {name: count_allocations(method, shape) for name, method in methods.items()}
    check_same(methods, shape)
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(blocks):
        for name, method in methods.items():
            times[name] += appends(method, shape, _PAGE if isinstance(method, PackedMethod) else dynamic_calls)
    rows = []
    for name in methods:
        rows.append(
            {
                "shape": str(shape),
                "tokens": tokens,
                "cache": name,
                # A mean, for ours must hold the page that each block packs; of the blocks, the middle one.
                "append_us": median(_means(times[name], blocks)),
                "median_call_us": median(times[name]),
                "slowest_call_us": max(times[name]),
                **allocations[name],
            }
        )
    for row in rows:
        row["speedup_dynamic"] = next(r["append_us"] for r in rows if r["cache"] == DYNAMIC) / row["append_us"]
    return rows


def _means(times: list[float], blocks: int) -> list[float]:
    size = len(times) // blocks
    return [sum(times[at : at + size]) / size for at in range(0, len(times), size)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", help="query heads/KV heads/head_dim; default: 9/3/64")
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 1024 4096 16384 65536 131072")
    parser.add_argument("--blocks", type=int, help="blocks of calls; default: 5")
    parser.add_argument("--dynamic-calls", type=int, default=16, help="calls of DynamicCache in a block")
    args = start(parser, argv)
    args.tokens = pick(args.tokens, args.quick, [1024, 4096, 16384, 65536, 131072], [1024, 4096])
    args.shapes = pick(args.shapes, args.quick, [str(SMOLLM2)], [str(SMOLLM2)])
    args.blocks = args.blocks or (2 if args.quick else 5)
    return args


def main(argv: Sequence[str] | None = None) -> Any:
    args, console, report = parse(argv), make_console(), Report("bench_append")
    report.note("Ours: mean of the 128 calls of a block, one of which packs a page per head; the middle block.")
    sweep(args, console, report, lambda shape, count: measure(shape, count, METHODS, args.blocks, args.dynamic_calls))
    return report.finish(args, console)


if __name__ == "__main__":
    main()
