"""Decode steps and prefill of one attention layer on a CUDA GPU.

THE AUTHORS HAVE NEVER RUN THIS ON A GPU: they had none. Only its code path was run, on a CPU.

    python -m benchmarks.gpu [--quick] [--dtype bf16] [--shapes 32/8/128] [--tokens 4096 65536]

The same comparison as bench_decode.py and bench_prefill.py, timed by CUDA events without CUDA graphs, so that short
steps are bound by the launching of kernels. The bandwidth is that of a copy within the device, its reads and writes
both counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console

from benchmarks import bench_decode, bench_prefill
from benchmarks.methods import CODECS, DTYPES, DYNAMIC, LLAMA_8B, PEERS, SMOLLM2, STATIC, Shape
from benchmarks.session import Report, make_console, make_parser, pick, start
from benchmarks.timing import Clock

NEVER_RUN = "This script has never been run on a GPU by the authors of hf_kvcache, who had none: judge what it prints."


def cuda_clock(action: Callable[[], Any]) -> float:
    """Microseconds between two CUDA events around ``action``."""
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    action()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) * 1e3


def copy_bandwidth(size: int, like: torch.Tensor, clock: Clock, repeats: int = 20) -> float:
    """GB/s (1e9 bytes) of a copy of ``size`` bytes within the device of ``like``, reads and writes counted, best."""
    source = torch.zeros(size, dtype=torch.uint8, device=like.device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / min(clock(lambda: target.copy_(source)) for _ in range(repeats)) / 1e3


def run(report: Report, args: argparse.Namespace, like: torch.Tensor, clock: Clock, console: Console) -> None:
    """Measure and show decode steps and prefill for tokens of the dtype and on the device of ``like``."""
    size = 2**26 if args.quick else 2**30
    bandwidth = copy_bandwidth(size, like, clock)
    report.facts["copy_bandwidth_gb_per_s"] = bandwidth
    report.note(f"Bandwidth {bandwidth:,.0f} GB/s: a copy of {size / 2**20:,.0f} MiB, reads and writes counted.")
    dense = f"dense {args.dtype}"
    setting = bench_decode.Setting(args.seconds, args.peer_tokens, clock, like, dense)
    names = (DYNAMIC, STATIC, *PEERS, dense, *CODECS)
    shapes = [Shape.parse(text) for text in args.shapes]
    bench_decode.run(report, shapes, args.tokens, names, setting, bandwidth, console)
    for row in report.rows:
        row["kind"] = "decode"
    bench_prefill.run(report, args, like, clock, console)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--shapes", nargs="+", help="query heads/KV heads/head_dim; default: 32/8/128 9/3/64")
    parser.add_argument("--tokens", type=int, nargs="+", help="multiples of 128; default: 1024 4096 16384 65536")
    parser.add_argument("--first", type=int, nargs="+", help="tokens of the first prefill; default: 4096")
    parser.add_argument("--chunk", type=int, default=512, help="new tokens of a prefill chunk")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of prefill at most")
    parser.add_argument("--seconds", type=float, default=20.0, help="for the decode rounds of one shape and T, at most")
    parser.add_argument("--peer-tokens", type=int, default=65536, help="largest T at which hqq and quanto run")
    args = start(parser, argv)
    args.tokens = pick(args.tokens, args.quick, [1024, 4096, 16384, 65536], [1024, 4096])
    args.first = pick(args.first, args.quick, [4096], [1024])
    args.shapes = pick(args.shapes, args.quick, [str(LLAMA_8B), str(SMOLLM2)], [str(SMOLLM2)])
    return args


def main(argv: Sequence[str] | None = None) -> Any:
    args = parse(argv)
    if not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks.gpu: torch finds no CUDA GPU on this machine; for the CPU: python -m benchmarks.run"
        )
    console, report = make_console(), Report("gpu", "cuda")
    console.print(f"[bold]{NEVER_RUN}[/bold]")
    report.note(NEVER_RUN)
    like = torch.empty(0, dtype=DTYPES[args.dtype], device="cuda")
    run(report, args, like, cuda_clock, console)
    return report.finish(args, console)


if __name__ == "__main__":
    main()
