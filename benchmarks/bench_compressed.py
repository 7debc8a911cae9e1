"""One decode step of one attention layer of DeepSeek V4 (Flash's widths), with transformers' cache and with ours.

    python -m benchmarks.bench_compressed [--tokens 16384 65536] [--rounds 9]

One layer of each kind with a compressor, 64 heads of 512 channels, 64 of them rotary, rates 4 and 128, an indexer of 64
heads of 128 that chooses 512 entries; hidden states of 512 instead of 4,096, so that the cache is not hidden behind
projections. Random weights, rows and entries, bfloat16, batch of 1. The methods take turns; medians over the rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import DeepseekV4Config, DynamicCache
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Attention, DeepseekV4RotaryEmbedding

from hf_kvcache import CompressedKVCache
from hf_kvcache.cache.memory import tensor_bytes
from hf_kvcache.integration.versions import CACHE_ARGUMENT

_KINDS = ("compressed_sparse_attention", "heavily_compressed_attention")
_METHODS: dict[str, Callable[[Any], Any]] = {
    "DynamicCache": lambda config: DynamicCache(config=config),
    "ours": CompressedKVCache,
    "ours 8-bit": lambda config: CompressedKVCache(config, 8),
    "ours 4-bit": lambda config: CompressedKVCache(config, 4),
}


def make_config(kind: str) -> DeepseekV4Config:
    """The config of a model of one layer."""
    config = DeepseekV4Config(
        hidden_size=512, num_hidden_layers=1, layer_types=[kind], q_lora_rank=512, o_lora_rank=64, vocab_size=8
    )
    config._attn_implementation = "eager"
    return config


def fill(layer: Any, kind: str, config: DeepseekV4Config, tokens: int) -> None:
    """Give a layer of a cache what ``tokens`` tokens leave, in the contract that the model calls."""

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, dtype=torch.bfloat16)

    rows = random(1, 1, tokens, config.head_dim)
    layer.update(rows, rows)
    rate, sparse = config.compress_rates[kind], kind == _KINDS[0]
    for name, dim in (("compressor", config.head_dim), ("indexer", config.index_head_dim))[: 1 + sparse]:
        width = dim * (1 + sparse)
        kv, gate, _ = layer.store_compression_weights(name, random(1, tokens, width), random(1, tokens, width))
        windows = kv.shape[1] // rate
        if sparse:
            parts = (x.view(1, windows, rate, width) for x in (kv, gate.float()))
            layer.update_overlap_state(name, *parts, dim)
        layer.update_compressor_states(name, random(1, windows, dim))


@torch.no_grad()
def measure(kind: str, tokens: int, rounds: int) -> dict[str, tuple[float, int]]:
    """Milliseconds of a step of a layer, and bytes held, by method."""
    config = make_config(kind)
    module = DeepseekV4Attention(config, 0).to(torch.bfloat16).eval()
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    rotary = DeepseekV4RotaryEmbedding(config)
    caches = {name: make(config) for name, make in _METHODS.items()}
    for held in caches.values():
        fill(held.layers[0], kind, config, tokens)
    times: dict[str, list[float]] = {name: [] for name in caches}
    for turn in range(rounds + 2):
        states = torch.randn(1, 1, config.hidden_size, dtype=torch.bfloat16)
        at = torch.tensor([[tokens + turn]])
        embeddings = {name: rotary(states, position_ids=at, layer_type=name) for name in ("main", "compress")}
        for name, held in caches.items():
            layer = held.layers[0]
            mask = torch.zeros(1, 1, 1, layer.get_mask_sizes(1)[0], dtype=torch.bfloat16)
            start = time.perf_counter()
            module(states, embeddings, at, mask, **{CACHE_ARGUMENT: held})
            times[name].append(1e3 * (time.perf_counter() - start))
    found = {}
    for name, held in caches.items():
        layer = held.layers[0]
        size = tensor_bytes(vars(layer)) if name == "DynamicCache" else sum(layer.bytes_by_part().values())
        found[name] = median(times[name][2:]), size
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for kind in _KINDS:
        for tokens in arguments.tokens:
            for name, (step, size) in measure(kind, tokens, arguments.rounds).items():
                print(f"{kind:<30}{tokens:>8}  {name:<14}{step:>9.2f} ms{size / 2**20:>9.2f} MiB")


if __name__ == "__main__":
    main()
