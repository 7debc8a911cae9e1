"""Time of a decode step of a small random model: not compiled, with a maximum length, and compiled (CPU).

    python -m benchmarks.bench_compiled

One thread, and its processor time, which other work on the machine changes least. The caches take turns; the best turn
of each is printed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

from hf_kvcache import QuantizedKVCache, bind, unbind
from hf_kvcache.integration.versions import CACHE_ARGUMENT

Step = Callable[[], None]


def small_model() -> Any:
    """A Llama of 8 layers with 8 query heads and 2 KV heads of 64."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1 << 16,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def steps(tokens: int, most: int) -> dict[str, Step]:
    """One decode step behind a prompt of ``tokens`` tokens, by name."""
    made: dict[str, Step] = {}
    for name, cache, compiled in (
        ("DynamicCache", DynamicCache, False),
        ("StaticCache, compiled", StaticCache, True),
        ("4 bits", QuantizedKVCache, False),
        ("4 bits, max_length", QuantizedKVCache, False),
        ("4 bits, max_length, compiled", QuantizedKVCache, True),
    ):
        model = small_model()
        if cache is StaticCache:
            held = StaticCache(config=model.config, max_cache_len=most)
        elif cache is DynamicCache:
            held = DynamicCache(config=model.config)
        else:
            held = QuantizedKVCache(model.config, bits=4, max_length=most if "max" in name else None)
        (bind if cache is QuantizedKVCache else unbind)(model.config)
        given = {CACHE_ARGUMENT: held}
        model(torch.randint(1000, (1, tokens)), **given)
        call = torch.compile(model.forward, fullgraph=True) if compiled else model
        made[name] = _step(call, given)
    return made


def _step(call: Callable[..., Any], given: dict[str, Any]) -> Step:
    token = torch.ones(1, 1, dtype=torch.long)

    def run() -> None:
        call(token, **given)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[500, 4000])
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    for tokens in options.tokens:
        timed = steps(tokens, tokens + 1000)
        best = dict.fromkeys(timed, float("inf"))
        for step in timed.values():
            for _ in range(5):
                step()
        for _ in range(options.turns):
            for name, step in timed.items():
                start = time.process_time()
                for _ in range(20):
                    step()
                best[name] = min(best[name], (time.process_time() - start) / 20)
        print(f"{tokens} tokens: " + ", ".join(f"{name} {1e3 * took:.2f} ms" for name, took in best.items()))


if __name__ == "__main__":
    main()
