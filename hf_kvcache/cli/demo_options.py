"""The caches that the demo compares, by name, and how many tokens it reads and generates by default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_kvcache import HeavyHitterCache, KVCache, QuantizedKVCache, SlidingWindowCache

#: The name of transformers' own cache, with which the others are compared.
FULL = "DynamicCache"
CACHES: dict[str, Callable[[Any], KVCache]] = {
    "none": lambda config: QuantizedKVCache(config, codec="none"),
    "8-bit": lambda config: QuantizedKVCache(config, bits=8),
    "4-bit": lambda config: QuantizedKVCache(config, bits=4),
    "3-bit": lambda config: QuantizedKVCache(config, bits=3),
    "2-bit": lambda config: QuantizedKVCache(config, bits=2),
    "snapkv-25%": lambda config: HeavyHitterCache(config, budget=0.25),
    "snapkv-25%-4-bit": lambda config: HeavyHitterCache(config, budget=0.25, bits=4),
    "window-768": lambda config: SlidingWindowCache(config, window=768),
}

#: Tokens of the text before the question.
PROMPT_TOKENS = 3072
#: Tokens of the answer at most.
ANSWER_TOKENS = 48

#: Names of the caches that run by default. The other one, ``none``, gives what DynamicCache gives.
DEFAULT_CACHES = ("8-bit", "4-bit", "3-bit", "2-bit", "snapkv-25%", "snapkv-25%-4-bit", "window-768")
