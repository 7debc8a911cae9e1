"""Fidelity: how far the next-token distributions through a compressed cache are from those through the full one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from hf_kvcache import HeavyHitterCache, KVCache, SparseReadCache
from hf_kvcache.cache.memory import tensor_bytes
from hf_kvcache.layers.evicting import EvictingLayer
from hf_kvcache_eval.caches import Method, held_bytes
from hf_kvcache_eval.cells import Memory, Metric, Series
from hf_kvcache_eval.statistics import mean_metric
from hf_kvcache_eval.task import Bench, Outcome, Piece, TaskInPieces
from hf_kvcache_eval.text import running_text, text_windows

#: Curves over the distance from the prefix, with the labels of their axes.
_LABELS = {"kl": "KL (nats)", "delta_nll": "change of NLL (nats)"}


@dataclass
class Fidelity(TaskInPieces):
    """Prefix, compress, then a teacher-forced continuation that is decoded through the compressed cache.

    Attributes:
        prefix: tokens that are prefilled.
        suffix: tokens that are decoded.
        windows: windows of the text, spread over it evenly; they are the samples.
        batch: windows decoded together.
        named_suffix: whether the task's name says ``suffix``, as it was asked for and is not the suite's.
    """

    prefix: int = 1024
    suffix: int = 256
    windows: int = 10
    batch: int = 5
    named_suffix: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"fidelity@{self.prefix}:{self.suffix}" if self.named_suffix else f"fidelity@{self.prefix}"

    def count(self, bench: Bench) -> int:
        return len(self._rows(bench))

    def measure(self, bench: Bench, method: Method, index: int) -> Piece:
        rows = self._rows(bench)[index]
        full = self._full(bench, index)
        step = self.batch if method.kind.rows else 1
        run = _Run(bench, method, self.prefix)
        other = torch.cat([run.decode(part) for part in rows.split(step)])
        found = {name: x.tolist() for name, x in _compare(full, other, rows[:, self.prefix :]).items()}
        if run.read is not None:
            found["read"] = [run.read] * len(rows)
        if run.lost:
            found["lost"] = run.lost
        return Piece(found, run.memory, run.timing)

    def outcome(self, bench: Bench, found: Piece) -> Outcome:
        joined = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in found.found.items()}
        return Outcome(
            metrics=_metrics(joined),
            series={
                name: by_distance(joined[name], "tokens after the prefix", label) for name, label in _LABELS.items()
            },
            memory=found.memory,
            protocol={
                "prefix": self.prefix,
                "suffix": self.suffix,
                "windows": len(joined["kl"]),
                "text": running_text(bench)[1],
                "what": "KL(full || cache) in nats per decoded token; the reference decodes through DynamicCache in "
                "float32 in the same blocks",
            },
            timing=found.timing,
        )

    def _rows(self, bench: Bench) -> tuple[torch.Tensor, ...]:
        """The windows ``[n, prefix + suffix]`` of each piece."""
        return text_windows(bench, self.prefix + self.suffix, self.windows).split(self.batch)

    def _full(self, bench: Bench, index: int) -> torch.Tensor:
        """Log-probabilities ``[B, suffix, vocabulary]`` of a piece through the full cache, computed once for all."""
        rows = self._rows(bench)
        owner, kept = bench.memo.get("reference", (None, {}))
        if owner != (self, bench.protocol.block):
            # One task's at a time: they are the largest thing that is held.
            kept = {}
            bench.memo["reference"] = (self, bench.protocol.block), kept
        if index not in kept:
            kept[index] = _Run(bench, Method("full"), self.prefix).decode(rows[index])
        return kept[index]


class _Run:
    """One method over the windows, batch by batch, with what it took."""

    def __init__(self, bench: Bench, method: Method, prefix: int) -> None:
        self.bench, self.method, self.prefix = bench, method, prefix
        self.memory: Memory | None = None
        self.read: float | None = None
        self.lost: list[float] = []
        self.timing: dict[str, float] = {"decode_seconds": 0.0, "decode_calls": 0}

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """Log-probabilities ``[B, suffix, vocabulary]`` of the continuations of ``rows [B, prefix + suffix]``."""
        reader = self.bench.reader(self.method)
        reader.prefill(rows[:, : self.prefix].tolist())
        self.memory = memory_of(reader.caches[0], reader.model.config, rows.shape[0], self.prefix)
        self.lost += lost_shares(reader.caches[0], self.prefix)
        started = time.perf_counter()
        out = [logits.log_softmax(-1) for logits in reader.logits(rows[:, self.prefix :])]
        self.timing["decode_seconds"] += time.perf_counter() - started
        self.timing["decode_calls"] += len(out)
        self.read = read_share(reader.caches[0])
        return torch.cat(out, 1)


def memory_of(cache: Any, config: Any, batch: int, tokens: int) -> Memory:
    """What ``cache`` holds of ``batch`` sequences of ``tokens`` tokens."""
    full, bits = full_bytes(config, batch * tokens), None
    if isinstance(cache, KVCache):
        report = cache.memory()
        full = report.full_bf16
        bits = report.bits_per_element if report.packed_elements else None
    elif type(cache) is DynamicCache:
        full = sum(_bytes_in_bf16(layer) for layer in cache.layers)
    return Memory(batch * tokens, held_bytes(cache), full, bits)


def _bytes_in_bf16(layer: Any) -> int:
    """Bytes of a layer of DynamicCache with its keys and values in bfloat16; recurrent states stay as they are."""
    held = [x for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if x is not None]
    return tensor_bytes(vars(layer)) - tensor_bytes(held) + 2 * sum(x.numel() for x in held)


def read_share(cache: Any) -> float | None:
    """Bytes that the latest step of a sparse cache read, of those that it would read of all tokens; else None."""
    if not isinstance(cache, SparseReadCache):
        return None
    report = cache.memory()
    return sum(report.read_last_step.values()) / sum(
        report.parts[name] for name in ("codes", "scales", "sinks", "tail")
    )


def lost_shares(cache: Any, tokens: int) -> list[float]:
    """The global eviction ratio of each sequence: the share of its ``tokens`` that no head of any layer keeps.

    Only layers that evict are looked at; it is empty for caches that have none.
    """
    layers = cache.own_layers if isinstance(cache, HeavyHitterCache) else []
    kept = [layer.kept_positions().flatten(1) for layer in layers if isinstance(layer, EvictingLayer)]
    if not kept:
        return []
    held = torch.zeros(len(kept[0]), tokens + 1, dtype=torch.bool)
    for positions in kept:
        # Position -1, which fills up, falls on the last column.
        held.scatter_(1, positions.where(positions >= 0, tokens), True)
    return (1 - held[:, :tokens].double().mean(1)).tolist()


def full_bytes(config: Any, tokens: int) -> int:
    """Bytes of a bfloat16 DynamicCache with full attention in every layer that holds ``tokens`` tokens.

    It is for caches that know no other layers: transformers' quantized ones, and those of other libraries.
    """
    text_config = config.get_text_config(decoder=True)
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return 2 * 2 * text_config.num_hidden_layers * heads * dim * tokens


def _compare(full: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Per decoded token ``[B, suffix]``; the last one's successor is unknown, so it has no NLL."""
    kl = (full.exp() * (full - other)).sum(-1)
    targets = targets.to(full.device)
    nll = [-x[:, :-1].gather(-1, targets[:, 1:, None]).squeeze(-1) for x in (full, other)]
    return {
        "kl": kl.double(),
        "agree": (full.argmax(-1) == other.argmax(-1)).double(),
        "nll": nll[1].double(),
        "delta_nll": (nll[1] - nll[0]).double(),
    }


def _metrics(found: dict[str, torch.Tensor]) -> dict[str, Metric]:
    # Windows are independent of each other, neighboring tokens are not: standard errors are over windows.
    kl = found["kl"]
    more = {name: mean_metric(found[name], False, "share") for name in found if name in ("read", "lost")}
    return {
        "kl": mean_metric(kl.mean(1), higher_is_better=False, unit="nats"),
        "kl_p99": Metric(kl.flatten().quantile(0.99).item(), None, False, "nats"),
        "kl_p999": Metric(kl.flatten().quantile(0.999).item(), None, False, "nats"),
        "top1": mean_metric(found["agree"].mean(1), unit="share"),
        "delta_nll": mean_metric(found["delta_nll"].mean(1), higher_is_better=False, unit="nats"),
        "nll": mean_metric(found["nll"].mean(1), higher_is_better=False, unit="nats"),
        **more,
    }


def by_distance(found: torch.Tensor, x_label: str, y_label: str) -> Series:
    """Means over samples and over bins of positions of ``found [n, positions]``, bins doubling in width."""
    x, y, error = [], [], []
    for start, stop in _bins(found.shape[1]):
        bin_means = found[:, start:stop].mean(1)
        x.append((start + stop - 1) / 2 + 1)
        y.append(bin_means.mean().item())
        error.append((bin_means.std() / len(bin_means) ** 0.5).item() if len(bin_means) > 1 else 0.0)
    return Series(x, y, error, x_label, y_label)


def _bins(length: int) -> Iterator[tuple[int, int]]:
    start, width = 0, 8
    while start < length:
        yield start, min(start + width, length)
        start += width
        width = start
