"""Bytes that one layer's cache holds, against the number of tokens.

    python -m benchmarks.bench_memory [--quick] [--shapes 9/3/64 32/8/128] [--tokens 1024 65536]

Batch of 1. DynamicCache's bytes are those of its tensors; ours are what ``cache.memory()`` says: codes, scales,
full-precision sinks and tail, tables, and the slack of what is allocated and not used. All hold tokens of ``--dtype``
(bfloat16: our sinks and tail are then bfloat16 too) and are compared with DynamicCache in bfloat16 and in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.methods import (
    CODECS,
    DTYPES,
    PEERS,
    SMOLLM2,
    PackedMethod,
    Shape,
    UnavailableError,
    empty_method,
    held_bytes,
)
from benchmarks.session import Report, Row, make_console, make_parser, pick, start
from benchmarks.sweep import sweep

FP32, BF16 = "DynamicCache fp32", "DynamicCache bf16"


def _dynamic(shape: Shape, keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> int:
    cache = DynamicCache(config=shape.config())
    cache.update(keys.to(dtype), values.to(dtype), 0)
    return held_bytes(cache)


@torch.inference_mode()
def measure(shape: Shape, tokens: int, like: torch.Tensor, report: Report) -> list[Row]:
    """The rows of all caches for one shape and number of tokens of the dtype of ``like``."""
    keys, values = shape.tokens(tokens, like)
    held = {FP32: _dynamic(shape, keys, values, torch.float32), BF16: _dynamic(shape, keys, values, torch.bfloat16)}
    bits: dict[str, float] = {}
    for name in (*PEERS, *CODECS):
        try:
            method = empty_method(name, shape, tokens, keys)
            method.fill(keys, values, shape.queries(1, like))
        except UnavailableError as error:
            report.note(str(error))
            continue
        held[name] = held_bytes(method.cache)
        if isinstance(method, PackedMethod) and method.cache.memory().packed_elements:
            bits[name] = method.cache.memory().bits_per_element
    return [
        {
            "shape": str(shape),
            "tokens": tokens,
            "cache": name,
            "bytes_held": size,
            "of_bf16": size / held[BF16],
            "of_fp32": size / held[FP32],
            **({"bits_per_packed_element": bits[name]} if name in bits else {}),
        }
        for name, size in held.items()
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", help="query heads/KV heads/head_dim; default: 4/1/128 9/3/64")
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 1024 4096 16384 32768")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the tokens that the caches take in")
    args = start(parser, argv)
    args.tokens = pick(args.tokens, args.quick, [1024, 4096, 16384, 32768], [1024, 4096])
    args.shapes = pick(args.shapes, args.quick, ["4/1/128", str(SMOLLM2)], [str(SMOLLM2)])
    return args


def main(argv: Sequence[str] | None = None) -> Any:
    args, console, report = parse(argv), make_console(), Report("bench_memory")
    like = torch.empty(0, dtype=DTYPES[args.dtype])
    report.note("Bytes grow in proportion to the KV heads: 4/1/128 is a Llama-3-8B layer (32/8/128) with one of its 8.")
    report.note(
        "At multiples of 128 tokens our full-precision tail is about as long as it gets (252 of 255 tokens, 192 on "
        "average), and the residual of hqq and quanto as short (0 of 127 tokens)."
    )
    sweep(args, console, report, lambda shape, count: measure(shape, count, like, report))
    return report.finish(args, console)


if __name__ == "__main__":
    main()
