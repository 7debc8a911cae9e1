"""What appending a token costs, against the number of tokens held; and what a decode step costs.

    python benchmarks/bench_append.py

One layer of SmolLM2's shape (9 query heads, 3 KV heads, head_dim 64, float32). *append* is ``update`` and storing,
packing included, averaged over ``page_size`` tokens so that exactly one page per head is packed; *DynamicCache* is its
``update``, which copies all it holds. *read* adds attention, which has to read what is held. Both sides run in one
process, taking turns; medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import DynamicCache, LlamaConfig

from hf_kvcache import KVCache
from hf_kvcache.reading import Scoring

QUERY_HEADS, HEADS, DIM = 9, 3, 64
SCORING = Scoring(DIM**-0.5)


def new_tokens(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random keys and values ``[1, 3, count, 64]``."""
    return torch.randn(1, HEADS, count, DIM), torch.randn(1, HEADS, count, DIM)


def config() -> LlamaConfig:
    """A one-layer model's config with SmolLM2's attention."""
    return LlamaConfig(
        hidden_size=QUERY_HEADS * DIM, num_hidden_layers=1, num_attention_heads=QUERY_HEADS, num_key_value_heads=HEADS
    )


def filled(codec: str | None, tokens: int) -> Any:
    """A cache that holds ``tokens`` tokens; DynamicCache without a codec."""
    cache: Any = DynamicCache(config=config()) if codec is None else KVCache(config(), codec)
    cache.update(*new_tokens(tokens), 0)
    if codec is not None:
        cache.layers[0].note_attended(None, tokens)
    return cache


def append(cache: Any) -> None:
    """Take in one token and store it."""
    cache.update(*new_tokens(1), 0)
    if isinstance(cache, KVCache):
        cache.layers[0].settle()


def read(cache: Any) -> None:
    """One decode step of one layer: take in a token and attend to everything."""
    keys, values = cache.update(*new_tokens(1), 0)
    query = torch.randn(1, QUERY_HEADS, 1, DIM)
    if isinstance(cache, KVCache):
        cache.layers[0].attend(query, None, SCORING)
        return
    packed = query.view(1, HEADS, QUERY_HEADS // HEADS, DIM)
    torch.nn.functional.scaled_dot_product_attention(packed, keys, values)


def per_call(action: Callable[[Any], None], cache: Any, calls: int) -> float:
    """Microseconds per call, averaged over ``calls``."""
    start = time.perf_counter()
    for _ in range(calls):
        action(cache)
    return (time.perf_counter() - start) / calls * 1e6


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--codecs", nargs="+", default=["none", "int8", "rotated4", "unbiased4", "unbiased2"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for name, action in (("append", append), ("read", read)):
        table = Table(title=f"{name}: microseconds per token, one layer, {torch.get_num_threads()} threads")
        table.add_column("cache")
        for tokens in args.tokens:
            table.add_column(f"{tokens:,} held", justify="right")
        rows: dict[str, list[str]] = {}
        for tokens in track(args.tokens, description=name, transient=True):
            caches = {codec or "DynamicCache": filled(codec, tokens) for codec in (None, *args.codecs)}
            times: dict[str, list[float]] = {label: [] for label in caches}
            for _ in range(args.rounds):
                for label, cache in caches.items():
                    times[label].append(per_call(action, cache, 128))
            for label, values in times.items():
                rows.setdefault(label, []).append(f"{median(values):,.0f}")
        for label, cells in rows.items():
            table.add_row(label, *cells)
        Console().print(table)


if __name__ == "__main__":
    main()
