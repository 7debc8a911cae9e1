"""What evicting costs: its share of a prefill and of decoding, the peak of a prefill in chunks, and endless generation.

    python -m benchmarks.bench_eviction [--quick] [--policies snapkv h2o] [--context 4096] [--endless 20000]

The model is SmolLM2 (``--quick``: a tiny random one), float32, batch of 1. Evicting is timed inside of the calls that
it slows down, around the layer's own ``evict``; what a policy costs elsewhere (the accumulated attention of all keys at
every step, for H2O) is not in it, so the times of whole steps stand beside it, methods taking turns. Peaks are bytes of
the cache's tensors: what ``memory()`` says after each chunk, and beside it the most that one layer held while its chunk
was there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.session import Report, Row, make_console, make_parser, pick, start
from benchmarks.tables import show
from benchmarks.timing import cpu_clock
from hf_kvcache import HeavyHitterCache, KVCache, SlidingWindowCache
from hf_kvcache.cache.memory import tensor_bytes
from hf_kvcache.eviction.evictor import Evictor
from hf_kvcache.integration.versions import with_cache

_POLICIES = ("snapkv", "streaming", "keydiff", "leverage", "expected", "h2o")
_BUDGET, _CHUNK = 512, 512


class Stopwatch:
    """Milliseconds spent in :meth:`Evictor.evict` while it is installed."""

    def __init__(self) -> None:
        self.ms = 0.0

    @contextmanager
    def installed(self) -> Iterator[Stopwatch]:
        """Time every eviction inside the block."""
        evict, self.ms = Evictor.evict, 0.0

        def timed(evictor: Evictor, *args: Any) -> None:
            began = time.perf_counter()
            evict(evictor, *args)
            self.ms += (time.perf_counter() - began) * 1e3

        with patch.object(Evictor, "evict", timed):
            yield self


def tiny_model() -> Any:
    """A random Llama that is small enough for thousands of steps."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1 << 17,
    )
    return LlamaForCausalLM(config).eval()


def forward(model: Any, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
    """The last logits ``[vocabulary]`` after ``tokens [1, T]``."""
    return model(tokens, **with_cache(model, cache), logits_to_keep=1).logits[0, -1]


def measure_prefill(model: Any, tokens: torch.Tensor, policies: Sequence[str], rounds: int) -> list[Row]:
    """Eviction's share of a prefill in one pass."""
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for policy in policies:
            cache = HeavyHitterCache(model.config, _BUDGET, policy)
            with Stopwatch().installed() as watch:
                total = cpu_clock(partial(forward, model, tokens, cache)) / 1e3
            found.setdefault(policy, []).append((total, watch.ms))
    return [
        {
            "part": "prefill",
            "policy": policy,
            "tokens": tokens.shape[1],
            "ms": median(ms for ms, _ in times),
            "evicting_ms": median(ms for _, ms in times),
            "share": median(evicting / (ms - evicting) for ms, evicting in times),
        }
        for policy, times in found.items()
    ]


def measure_decoding(model: Any, tokens: torch.Tensor, policies: Sequence[str], blocks: int) -> list[Row]:
    """Eviction's share of decoding, by blocks of 128 tokens with one eviction each, methods taking turns."""
    caches = {policy: HeavyHitterCache(model.config, _BUDGET, policy, interval=128) for policy in policies}
    last: dict[str, torch.Tensor] = {}
    for policy, cache in caches.items():
        last[policy] = forward(model, tokens, cache).argmax().view(1, 1)
    times: dict[str, list[tuple[float, float]]] = {policy: [] for policy in policies}
    for _ in range(blocks):
        for policy, cache in caches.items():
            with Stopwatch().installed() as watch:
                began = time.perf_counter()
                for _ in range(128):
                    last[policy] = forward(model, last[policy], cache).argmax().view(1, 1)
                total = (time.perf_counter() - began) * 1e3
            times[policy].append((total, watch.ms))
    return [
        {
            "part": "decoding",
            "policy": policy,
            "tokens": tokens.shape[1],
            "ms": median(ms for ms, _ in found) / 128,
            "evicting_ms": median(ms for _, ms in found) / 128,
            "share": median(evicting / (ms - evicting) for ms, evicting in found),
        }
        for policy, found in times.items()
    ]


def measure_peak(model: Any, tokens: torch.Tensor) -> Row:
    """The peak of a prefill in chunks against what the full cache holds."""
    cache, peak, full = HeavyHitterCache(model.config, _BUDGET, "snapkv"), 0, DynamicCache(config=model.config)
    largest = [0]
    watched(cache, largest)
    for chunk in tokens.split(_CHUNK, 1):
        forward(model, chunk, cache)
        peak = max(peak, cache.memory().total)
        forward(model, chunk, full)
    held = tensor_bytes([vars(layer) for layer in full.layers])
    # While a layer's chunk is there, the other layers hold at most what they hold after a chunk.
    transient = peak + max(0, largest[0] - peak // len(cache.layers))
    return {
        "part": "peak",
        "policy": "snapkv",
        "tokens": tokens.shape[1],
        "peak_bytes": transient,
        "held_bytes": cache.memory().total,
        "full_bytes": held,
        "share": transient / held,
    }


def watched(cache: KVCache, largest: list[int]) -> None:
    """Keep the most bytes that the tensors of a layer's storage had when it was about to evict in ``largest``."""
    for layer in cache.own_layers:
        flush = layer.flush

        def watching(layer: Any = layer, flush: Any = flush) -> None:
            new, storage = layer._new, layer.storage
            if new is not None and storage is not None:
                dense = storage.dense.keys.nbytes + storage.dense.values.nbytes
                pages = storage.pool.held_pages * storage.layout.record_bytes
                # Old pages and dense buffer, the new tokens in it, and the pages that replace the old ones.
                largest[0] = max(largest[0], dense + 2 * pages + 2 * (new.keys.nbytes + new.values.nbytes))
            flush()

        layer.flush = watching  # type: ignore[method-assign]


def measure_endless(tokens: int) -> Row:
    """Bytes and time per token of a window, in the first and in the last thousand of ``tokens``."""
    model = tiny_model()
    cache = SlidingWindowCache(model.config, 256, reindex=True)
    token, times, held = torch.zeros(1, 1, dtype=torch.long), [], []
    for number in range(tokens):
        began = time.perf_counter()
        token = forward(model, token, cache).argmax().view(1, 1)
        times.append((time.perf_counter() - began) * 1e6)
        if number % 64 == 0:
            held.append(cache.memory().total)
    part = min(1000, tokens // 2)
    # The window has to be full first.
    first, last = times[512 : 512 + part] or times[:part], times[-part:]
    return {
        "part": "endless",
        "policy": "streaming",
        "tokens": tokens,
        "first_us": median(first),
        "last_us": median(last),
        "ratio": median(last) / median(first),
        "first_bytes": max(held[8:16] or held),
        "last_bytes": max(held[-8:]),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--policies", nargs="+", help=f"default: {' '.join(_POLICIES)}")
    parser.add_argument("--context", type=int, help="tokens of the prefill; default: 4096")
    parser.add_argument("--endless", type=int, help="tokens generated through a window; default: 20000")
    parser.add_argument("--rounds", type=int, help="repeats of each method; default: 1")
    args = start(parser, argv)
    args.policies = pick(args.policies, args.quick, list(_POLICIES), ["snapkv", "streaming"])
    args.context = args.context or (1024 if args.quick else 4096)
    args.endless = args.endless or (2000 if args.quick else 20000)
    args.rounds = args.rounds or 1
    return args


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> Any:
    from hf_kvcache.cli.models import load_default_model

    args, console, report = parse(argv), make_console(), Report("bench_eviction")
    model = tiny_model() if args.quick else load_default_model()[0]
    torch.manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (1, args.context))
    report.note(
        f"Budget {_BUDGET} tokens; decoding evicts every 128 tokens. {'A tiny model.' if args.quick else 'SmolLM2.'}"
    )
    report.rows += measure_prefill(model, tokens, args.policies, args.rounds)
    report.rows += measure_decoding(model, tokens[:, :1024], args.policies, args.rounds)
    report.rows.append(measure_peak(model, tokens))
    report.rows.append(measure_endless(args.endless))
    show(report.script, report.rows, console)
    return report.finish(args, console)


if __name__ == "__main__":
    main()
