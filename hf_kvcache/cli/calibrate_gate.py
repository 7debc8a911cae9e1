"""``hf-kvcache calibrate --method gate``: fitting the gate of an eviction policy."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch

from hf_kvcache.cache.gate_calibration import calibrate_gate
from hf_kvcache.cli import models
from hf_kvcache.lowrank import texts
from hf_kvcache.lowrank.moment_collection import progress_bar


def run_gate(args: argparse.Namespace) -> int:
    """Fit a gate to the texts and write it, by the arguments of ``hf-kvcache calibrate``.

    Raises:
        ValueError: for an argument that is not accepted.
    """
    for name in ("group", "before_rope", "center"):
        if name in args:
            raise ValueError(f"--{name.replace('_', '-')} with --method gate, which has no such option")
    if not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"--out={args.out!r}: there is no such folder")
    found: Iterable[str]
    found = texts.from_files(args.texts) if args.texts else texts.from_dataset(args.dataset, args.split, args.column)
    model, tokenizer = models.load_default_model(args.model, getattr(torch, args.dtype), args.device)
    with progress_bar(args.tokens) as advance:
        gate = calibrate_gate(
            model, found, tokenizer, args.tokens, args.length, vars(args).get("inner", 0), advance=advance
        )
    gate.save(args.out)
    explained = " ".join(f"{gate.fit[index]:.2f}" for index in sorted(gate.fit))
    print(f"{args.out}: a gate of {len(gate.layers)} layers, from {gate.tokens} tokens")
    print(f"explained of the held-out tokens' variance, by layer: {explained}")
    return 0
