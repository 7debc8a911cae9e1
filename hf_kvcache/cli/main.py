"""The command line: ``hf-kvcache`` and its commands."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from hf_kvcache.cli import models
from hf_kvcache.cli.calibrate_bits import run_bits
from hf_kvcache.cli.calibrate_gate import run_gate
from hf_kvcache.cli.compare import add_compare
from hf_kvcache.cli.demo_options import ANSWER_TOKENS, CACHES, DEFAULT_CACHES, PROMPT_TOKENS
from hf_kvcache.cli.explain import add_explain
from hf_kvcache.cli.info import print_info
from hf_kvcache.cli.methods import add_methods
from hf_kvcache.cli.plan import add_plan
from hf_kvcache.lowrank import calibrate, methods, texts
from hf_kvcache.lowrank.methods.base import CENTERS
from hf_kvcache.utils import processes

#: Methods of ``calibrate`` that find something else than bases, and what runs them.
_OTHER_METHODS: dict[str, Callable[[argparse.Namespace], int]] = {"bits": run_bits, "gate": run_gate}


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

    _add_demo(commands)
    add_plan(commands)
    add_explain(commands)
    add_compare(commands)
    add_methods(commands)
    _add_calibrate(commands)
    info = commands.add_parser(
        "info", help="versions, device, kernels, the names that are registered, and what is slow here"
    )
    info.set_defaults(run=_info)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("demo", help="answer a question over a long text with several caches, and compare")
    parser.add_argument("--model", help=models.MODEL_HELP)
    parser.add_argument("--max-new-tokens", type=int, default=ANSWER_TOKENS, metavar="N", help="default: %(default)s")
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS, metavar="N", help="default: %(default)s")
    names, default = (" ".join(some).replace("%", "%%") for some in (CACHES, DEFAULT_CACHES))
    parser.add_argument("--caches", nargs="+", metavar="NAME", help=f"of: {names} (default: {default})")
    parser.add_argument("--device", help="default: cpu")
    parser.set_defaults(run=_demo)


def _add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="find the bases in which LatentKVCache can store a model's keys and values, or fit a gate",
        description="Find the bases in which LatentKVCache can store a model's keys and values, at any rank. Some "
        "30,000 tokens of text of the kind that the model will read are the least. The text that comes with this "
        "package is too short (22 kB), so a text must be given. Started by accelerate launch or torchrun, each process "
        "reads its share of it. --method bits finds widths of layers, keys and values for bits= of a cache instead; "
        "--method gate fits what the eviction policy of that name scores tokens by. Both read in one process.",
    )
    parser.add_argument("--model", help=models.MODEL_HELP)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--texts", nargs="+", metavar="FILE", help="text files, read in this order")
    source.add_argument(
        "--dataset", metavar="NAME", help="data set of the hub, streamed; NAME:CONFIGURATION if it has some"
    )
    parser.add_argument("--split", default="train", help="of the data set (default: %(default)s)")
    parser.add_argument("--column", default="text", help="of the data set (default: %(default)s)")
    own = {name: parameter.default for name, parameter in inspect.signature(calibrate).parameters.items()}
    parser.add_argument(
        "--tokens", type=int, default=own["tokens"], metavar="N", help="tokens read (default: %(default)s)"
    )
    parser.add_argument(
        "--length", type=int, default=own["length"], metavar="N", help="tokens at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--method",
        default=own["method"],
        help=f"{', '.join([*methods.available(), *_OTHER_METHODS])} (default: %(default)s)",
    )
    # Only options that are given reach the method: each method has its own options and defaults.
    only_given = argparse.SUPPRESS
    parser.add_argument("--group", type=int, default=only_given, metavar="N", help="KV heads that share coefficients")
    parser.add_argument(
        "--before-rope",
        action=argparse.BooleanOptionalAction,
        default=only_given,
        help="store keys as they are before their rotary embedding: fewer directions, slow steps",
    )
    parser.add_argument("--center", default=only_given, metavar="SIDES", help=f"subtract means of: {' '.join(CENTERS)}")
    parser.add_argument("--bits", type=float, default=only_given, metavar="N", help="of --method bits: average width")
    parser.add_argument(
        "--windows", type=int, default=only_given, metavar="N", help="of --method bits: windows measured (default: 4)"
    )
    parser.add_argument(
        "--inner",
        type=int,
        default=only_given,
        metavar="N",
        help="of a gate: channels of an MLP (default: a linear map)",
    )
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
    if args.method in _OTHER_METHODS:
        return _OTHER_METHODS[args.method](args)
    for name, owner in (("bits", "bits"), ("windows", "bits"), ("inner", "gate")):
        if name in args:
            raise ValueError(f"--{name}={vars(args)[name]!r} with --method {args.method}; accepted: --method {owner}")
    # Wrong arguments are found before the model is loaded.
    given = {name: vars(args)[name] for name in ("group", "before_rope", "center") if name in args}
    method = methods.resolve(args.method, **given)
    if not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"--out={args.out!r}: there is no such folder")
    found: Iterable[str]
    if args.texts:
        found, names = texts.from_files(args.texts), [Path(path).name for path in args.texts]
    else:
        found, names = texts.from_dataset(args.dataset, args.split, args.column), [args.dataset]
    with processes.launched() as launch:
        device = processes.own_device(args.device)
        model, tokenizer = models.load_default_model(args.model, getattr(torch, args.dtype), device)
        size = {"tokens": args.tokens, "length": args.length}
        first = launch.rank == 0
        projection = calibrate(model, found, tokenizer, method, **size, names=names, progress=first, processes=launch)
        if first:
            projection.save(args.out)
            print(f"{args.out}: {method.name} bases of {len(projection.bases)} layers, from {projection.tokens} tokens")
    return 0


def _info(args: argparse.Namespace) -> int:
    print_info()
    return 0
