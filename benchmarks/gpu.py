"""Decode steps and prefill of one attention layer on a CUDA GPU.

    python -m benchmarks.gpu [--quick] [--dtype bf16] [--shapes 32/8/128] [--tokens 4096 65536] [--budget 480]

The same comparison as bench_decode.py and bench_prefill.py, timed by CUDA events without CUDA graphs, so that short
steps are bound by the launching of kernels. The bandwidth is that of a copy within the device, its reads and writes
both counted. The cases run in the order of what they tell: every number of tokens of the first shape, then its prefill,
then the next shape. When the budget is spent, no further case begins, and the notes say which were left out. Results
are written after every case. A case that fails is noted, the others run, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console

from benchmarks import bench_decode, bench_prefill
from benchmarks.methods import CODECS, DTYPES, DYNAMIC, LLAMA_8B, PEERS, SMOLLM2, STATIC, Shape
from benchmarks.session import Report, make_console, make_parser, pick, start
from benchmarks.timing import Clock

NOT_VERIFIED = "The authors of hf_kvcache have not yet run this script to its end on a GPU: judge what it prints."


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


class Cases:
    """Runs cases one after the other while there is time, and keeps what each has brought.

    Args:
        report: gets the rows and what is left out.
        args: of the script; ``args.budget`` seconds from now, no further case begins.
        console: for what fails.
    """

    def __init__(self, report: Report, args: argparse.Namespace, console: Console) -> None:
        self.report, self.args, self.console = report, args, console
        self.end = time.monotonic() + args.budget
        self.failed: list[str] = []

    def run(self, name: str, action: Callable[[], None]) -> None:
        """Run one case, unless the budget is spent; whatever goes wrong is noted and costs only this case."""
        if time.monotonic() > self.end:
            self.report.note(f"Left out, the {self.args.budget:g} seconds being over (--budget): {name}.")
            return
        try:
            action()
        except Exception as error:  # a kernel that does not compile, memory that is not there, a wrong result
            reason = (str(error).strip().splitlines() or ["no message"])[0]
            self.failed.append(name)
            self.report.note(f"Failed: {name}: {type(error).__name__}: {reason}")
            self.console.print_exception()
        self.report.save(self.args)


def run(report: Report, args: argparse.Namespace, like: torch.Tensor, clock: Clock, console: Console) -> list[str]:
    """Measure and show decode steps and prefill for tokens of the dtype and on the device of ``like``.

    Returns:
        The cases that failed.
    """
    size = 2**26 if args.quick else 2**30
    bandwidth = copy_bandwidth(size, like, clock)
    report.facts["copy_bandwidth_gb_per_s"] = bandwidth
    report.note(f"Bandwidth {bandwidth:,.0f} GB/s: a copy of {size / 2**20:,.0f} MiB, reads and writes counted.")
    dense = f"dense {args.dtype}"
    setting = bench_decode.Setting(args.seconds, args.peer_tokens, clock, like, dense)
    skipped = PEERS if args.no_peers else ()
    names = [name for name in (DYNAMIC, STATIC, *PEERS, dense, *CODECS) if name not in skipped]
    cases = Cases(report, args, console)

    def decode(shape: str, tokens: int) -> None:
        start = len(report.rows)
        bench_decode.run(report, [Shape.parse(shape)], [tokens], names, setting, bandwidth, console)
        for row in report.rows[start:]:
            row["kind"] = "decode"

    def prefill(shape: str, tokens: list[int], first: list[int]) -> None:
        own = argparse.Namespace(**vars(args) | {"shapes": [shape], "tokens": tokens, "first": first})
        bench_prefill.run(report, own, like, clock, console, skipped)

    for shape in args.shapes:
        for count in args.tokens:
            cases.run(f"decode {shape}, T = {count:,}", partial(decode, shape, count))
        for count in args.first:
            cases.run(f"prefill {shape}, first {count:,}", partial(prefill, shape, [], [count]))
        for count in args.tokens:
            cases.run(f"prefill {shape}, a chunk over {count:,}", partial(prefill, shape, [count], []))
    return cases.failed


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--shapes", nargs="+", help="query heads/KV heads/head_dim; default: 32/8/128 9/3/64")
    parser.add_argument("--tokens", type=int, nargs="+", help="multiples of 128; default: 1024 4096 16384 65536")
    parser.add_argument("--first", type=int, nargs="+", help="tokens of the first prefill; default: 4096")
    parser.add_argument("--chunk", type=int, default=512, help="new tokens of a prefill chunk")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of prefill at most")
    parser.add_argument("--seconds", type=float, default=6.0, help="for the rounds of one case, at most")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds after which no further case begins")
    parser.add_argument("--peer-tokens", type=int, default=65536, help="largest T at which hqq and quanto run")
    parser.add_argument("--no-peers", action="store_true", help="leave out other libraries' caches, which may compile")
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
    console.print(f"[bold]{NOT_VERIFIED}[/bold]")
    report.note(NOT_VERIFIED)
    like = torch.empty(0, dtype=DTYPES[args.dtype], device="cuda")
    failed = run(report, args, like, cuda_clock, console)
    path = report.finish(args, console)
    if failed:
        raise SystemExit(f"benchmarks.gpu: failed: {'; '.join(failed)}")
    return path


if __name__ == "__main__":
    main()
