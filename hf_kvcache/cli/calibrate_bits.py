"""``hf-kvcache calibrate --method bits``: widths of a model's layers, keys and values for a given average."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hf_kvcache.cache.bit_calibration import calibrate_bits
from hf_kvcache.cli import models
from hf_kvcache.lowrank import texts


def run_bits(args: argparse.Namespace) -> int:
    """Measure the layers on windows of the texts and write the widths, by the arguments of ``hf-kvcache calibrate``.

    Raises:
        ValueError: for an argument that is not accepted, or if widths by layer are no better than one for all.
    """
    for name in ("group", "before_rope", "center"):
        if name in args:
            raise ValueError(f"--{name.replace('_', '-')} with --method bits, which has no such option")
    if "bits" not in args:
        raise ValueError("--method bits needs --bits, the average width")
    if not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"--out={args.out!r}: there is no such folder")
    found: Iterable[str]
    found = texts.from_files(args.texts) if args.texts else texts.from_dataset(args.dataset, args.split, args.column)
    model, tokenizer = models.load_default_model(args.model, getattr(torch, args.dtype), args.device)
    windows = {"windows": args.windows} if "windows" in args else {}
    with _progress_bar() as advance:
        bits = calibrate_bits(model, found, tokenizer, args.bits, args.tokens, args.length, **windows, advance=advance)
    bits.save(args.out)
    measured = ", ".join(f"{name} {kl:.4f}" for name, kl in bits.measured.items() if name != "bits")
    print(f"{args.out}: widths of {len(bits.layers)} layers, {args.bits:g} bits on average")
    print(f"KL in nats a token on text that was not used: {measured}")
    return 0


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on the terminal, told of what was measured and of the most that may be; none without rich."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda done, most: None
        return

    columns = (TextColumn("measuring layers"), BarColumn(), MofNCompleteColumn(), TextColumn("at most"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, most: bar.update(task, completed=done, total=most)
