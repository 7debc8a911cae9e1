"""The caches that a plan compares, by their names: ``full``, ``none``, ``quantized:4``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from hf_kvcache.cache.base import KVCache
from hf_kvcache.cache.quantized import QuantizedKVCache

#: What a plan compares by default.
DEFAULT = ("full", "none", "quantized:8", "quantized:4", "quantized:2")
_ACCEPTED = (
    "'full' (transformers' DynamicCache), 'none' (KVCache), 'quantized:BITS', 'quantized:KEY_BITS:VALUE_BITS', or the "
    "name of a codec ('codec:int4')"
)

Make = Callable[[PreTrainedConfig], Cache]


def maker(name: str) -> Make:
    """A function that makes the cache of that name for a config.

    Raises:
        ValueError: if no cache has that name.
    """
    kind, *settings = name.split(":")
    if kind == "full" and not settings:
        return _dynamic
    if kind == "none" and not settings:
        return lambda config: KVCache(config)
    if kind == "codec" and len(settings) == 1:
        return lambda config: KVCache(config, settings[0])
    if kind == "quantized" and 1 <= len(settings) <= 2 and all(bits.isdigit() for bits in settings):
        bits = [int(number) for number in settings]
        options: dict[str, Any] = {"bits": bits[0]} if len(bits) == 1 else {"key_bits": bits[0], "value_bits": bits[1]}
        return lambda config: QuantizedKVCache(config, **options)
    raise ValueError(f"caches: {name!r}; accepted: {_ACCEPTED}")


def _dynamic(config: PreTrainedConfig) -> DynamicCache:
    cache = DynamicCache(config=config)
    with suppress(ValueError):  # this package has no cache for the model
        # transformers adds layers that run several times (Dory) when they come.
        more = len(KVCache(config, bind=False).layers) - len(cache.layers)
        cache.layers += [DynamicLayer() for _ in range(more)]
    return cache
