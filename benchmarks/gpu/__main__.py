"""Is every kernel right on this GPU, and how fast is it? (``make gpu``)

    python -m benchmarks.gpu                                       all steps, under 8 minutes
    python -m benchmarks.gpu --steps a b --only unbiased4          some steps, some cases
    python -m benchmarks.gpu --device cpu --tiny                   a dry run: does every line run?
    python -m benchmarks.gpu --device cpu --tiny --interpreter     the same with the Triton kernels, in the interpreter

The most valuable comes first, each step has a limit of its own, and every result is on disk as soon as it is known:

    a  environment      versions, bandwidth, costs of launches and uploads
    b  correctness      every operation against float64; and beside it
       generation       every kind of cache through generate()
    c  synchronization  does a plain step wait for the GPU? It must not
    d  layer            one attention layer, 4k to 128k tokens, against DynamicCache and SDPA in place
    e  model            8 layers in Llama-3-8B's shape
    f  tests            the tests of the Triton kernels

Results go to the folder that the environment variable OUT names, else to results/gpu. In the end gpu_<card>.csv has all
of them, with the card, the driver and the versions.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.results import Results
from benchmarks.gpu.session import STEPS, Session, default_folder
from benchmarks.gpu.settings import Settings, be_quiet


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS), help="default: all")
    parser.add_argument("--total", type=float, default=465, help="seconds in all (default: 465)")
    parser.add_argument("--only", default="", help="in b, beside it and in c, only what has this in its name")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    parser.add_argument("--interpreter", action="store_true", help="on the CPU: the Triton kernels, interpreted")
    parser.add_argument("--workers", type=int, help="processes of b (default: two fewer than there are cores)")
    parser.add_argument("--out", type=Path, default=default_folder(), help="folder of the results")
    inside = parser.add_argument_group("what the command calls itself with")
    inside.add_argument("--part", choices=(*STEPS.values(), "generation"))
    inside.add_argument("--part-file", type=Path)
    inside.add_argument("--part-seconds", type=float, default=1e9)
    inside.add_argument("--part-worker", type=int, nargs=2, default=(0, 1))
    return parser.parse_args(argv)


def run_part(args: argparse.Namespace) -> None:
    """One step, or one worker's part of it, in this process."""
    from benchmarks.gpu.results import read

    be_quiet()
    settings = Settings(torch.device(args.device), args.tiny, args.out, args.part_seconds, args.only)
    done = set(read(args.part_file))
    results = Results(args.part_file, args.part)
    module = importlib.import_module(f"benchmarks.gpu.{args.part}")
    if args.part == "correctness":
        module.run_part(settings, results, *args.part_worker, done)
    else:
        module.run(settings, results)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: torch finds no CUDA GPU on this machine; --device cpu --tiny is a dry run")
        return 2
    if args.part:
        run_part(args)
        return 0
    return Session(args).run()


if __name__ == "__main__":
    sys.exit(main())
