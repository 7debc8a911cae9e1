"""The caches that a plan compares, by their names: ``full``, ``quantized:4``, ``snapkv:2k+4bits``, ``lowrank:0.5``."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from hf_kvcache.cache.base import KVCache
from hf_kvcache.cache.evicting import HeavyHitterCache, SlidingWindowCache
from hf_kvcache.cache.latent import LatentKVCache
from hf_kvcache.cache.quantized import QuantizedKVCache
from hf_kvcache.cache.sparse import SparseReadCache
from hf_kvcache.codecs.registry import resolve as resolve_codec
from hf_kvcache.eviction.registry import available as policies
from hf_kvcache.eviction.registry import resolve as resolve_policy
from hf_kvcache.eviction.registry import wrappers
from hf_kvcache.planning.sizes import parse_count
from hf_kvcache.sparse.registry import available as selectors

#: What a plan compares by default.
DEFAULT = ("full", "none", "quantized:8", "quantized:4", "quantized:2")

#: A name of every kind.
EXAMPLES = (
    *("full", "none", "quantized:8:4", "codec:int4", "quantized:4@64k", "snapkv:2k+4bits", "h2o:0.25", "window:4k:4"),
    *("sparse:moments:0.25+4bits", "lowrank:0.5"),
)

Make = Callable[[PreTrainedConfig], Cache]


@dataclass(frozen=True)
class LowRank:
    """Makes a cache of low-rank coefficients.

    Attributes:
        rank: coefficients of each KV head, on average; None if ``ratio`` says it.
        ratio: the same as a share of the head dimension.
        file: the bases, written by ``hf-kvcache calibrate``; None if there are none yet.
        stored: how the coefficients are packed, as arguments of the cache.
    """

    rank: int | None
    ratio: float | None
    file: str | None = None
    stored: dict[str, Any] = field(default_factory=dict)

    def __call__(self, config: PreTrainedConfig) -> Cache:
        if self.file is None:
            asked = self.ratio if self.rank is None else self.rank
            raise ValueError(
                f"lowrank:{asked}: a cache of coefficients needs the bases of a calibration, only a plan does without; "
                f"accepted: lowrank:{asked}:FILE with a file of `hf-kvcache calibrate`"
            )
        return LatentKVCache(config, projection=self.file, rank=self.rank, ratio=self.ratio, **self.stored)


def maker(name: str) -> Make:
    """A function that makes the cache of that name for a config.

    Names are:

    - ``full``: transformers' ``DynamicCache``; ``none``: ``KVCache`` in full precision.
    - ``quantized:BITS``, ``quantized:KEY_BITS:VALUE_BITS`` or ``quantized:FILE``: ``QuantizedKVCache``, with the widths
      by layer of a JSON file of ``hf-kvcache calibrate --method bits``; ``codec:NAME``: ``KVCache`` with
      that codec. Behind all but ``full``, ``@TOKENS`` is their ``max_length`` (``quantized:4@64k``).
    - ``POLICY:BUDGET``: ``HeavyHitterCache``. A budget is a number of tokens (``h2o:1024``, ``ada-snapkv:2k``), or a
      share below 1 (``snapkv:0.25``).
    - ``window:TOKENS`` or ``window:TOKENS:SINKS``: ``SlidingWindowCache``.
    - ``sparse:SELECTOR:BUDGET``: ``SparseReadCache``, with the tokens that a step reads (``sparse:moments:1024``), or a
      share below 1. A fourth part is the number of first layers that read everything.
    - ``lowrank:RANK`` or ``lowrank:SHARE``: ``LatentKVCache`` for models that cache keys and values. A third part names
      the file with the bases; without it the cache can be planned and not be made.

    Behind the last four, ``+BITSbits``, ``+KEY_BITS:VALUE_BITSbits`` or ``+CODEC`` say how tokens are packed.

    Raises:
        ValueError: if no cache has that name.
    """
    parsed = _plain(name) or _with_codec(name)
    if parsed is None:
        raise ValueError(f"caches: {name!r}; accepted: {_accepted()}")
    return parsed


def _plain(name: str) -> Make | None:
    """A cache that keeps every token in full width."""
    if name == "full":
        return _dynamic
    cache, at, room = name.partition("@")
    tokens = _budget(room)
    if at and not isinstance(tokens, int):
        return None
    options: dict[str, Any] = {"max_length": tokens} if at else {}
    kind, *settings = cache.split(":")
    if kind == "none" and not settings:
        return lambda config: KVCache(config, **options)
    if kind == "codec" and len(settings) == 1:
        return lambda config: KVCache(config, settings[0], **options)
    if kind == "quantized" and len(settings) == 1 and settings[0].endswith(".json"):
        return lambda config: QuantizedKVCache(config, bits=settings[0], **options)
    if kind == "quantized" and 1 <= len(settings) <= 2 and all(bits.isdigit() for bits in settings):
        bits = [int(number) for number in settings]
        options |= {"bits": bits[0]} if len(bits) == 1 else {"key_bits": bits[0], "value_bits": bits[1]}
        return lambda config: QuantizedKVCache(config, **options)
    return None


def _with_codec(name: str) -> Make | None:
    """A cache that keeps or reads some tokens, or keeps some directions of each."""
    cache, plus, codec = name.rpartition("+")
    cache, stored = (cache, _stored(codec)) if plus else (codec, {})
    kind, _, settings = cache.partition(":")
    if stored is None or not settings:
        return None
    if kind == "lowrank":
        return _low_rank(settings, stored)
    if kind == "window":
        return _window(settings, stored)
    if kind == "sparse":
        return _sparse(settings, stored)
    with suppress(ValueError):
        resolve_policy(kind)
        budget = _budget(settings)
        if budget is not None:
            return lambda config: HeavyHitterCache(config, budget, kind, **stored)
    return None


def _stored(codec: str) -> dict[str, Any] | None:
    """``"4bits"``, ``"8:4bits"`` or ``"int4"`` as arguments of a cache; None if it is none of them."""
    if match := re.fullmatch(r"(\d+)(?::(\d+))?bits", codec):
        first, second = match.groups()
        return {"bits": int(first)} if second is None else {"key_bits": int(first), "value_bits": int(second)}
    with suppress(ValueError):
        resolve_codec(codec)
        return {"codec": codec}
    return None


def _budget(text: str) -> int | float | None:
    """``"1024"``, ``"2k"`` or ``"0.25"``; None if it is neither a number of tokens nor a share."""
    if re.fullmatch(r"0?\.\d+", text):
        return float(text) or None
    with suppress(ValueError):
        return parse_count("caches", text)
    return None


def _window(settings: str, stored: dict[str, Any]) -> Make | None:
    window, colon, sinks = settings.partition(":")
    tokens = _budget(window)
    if not isinstance(tokens, int) or (colon and not sinks.isdigit()):
        return None
    options = stored | ({"sinks": int(sinks)} if colon else {})
    return lambda config: SlidingWindowCache(config, tokens, **options)


def _sparse(settings: str, stored: dict[str, Any]) -> Make | None:
    selector, _, read = settings.partition(":")
    read, colon, dense = read.partition(":")
    budget = _budget(read)
    if selector not in selectors() or budget is None or (colon and not dense.isdigit()):
        return None
    options = stored | ({"dense_layers": int(dense)} if colon else {})
    return lambda config: SparseReadCache(config, budget, selector, **options)


def _low_rank(settings: str, stored: dict[str, Any]) -> Make | None:
    width, _, file = settings.partition(":")
    asked = _budget(width)
    if asked is None or "key_bits" in stored:
        return None
    rank, ratio = (asked, None) if isinstance(asked, int) else (None, asked)
    return LowRank(rank, ratio, file or None, stored)


def _accepted() -> str:
    names = ", ".join(policies())
    return (
        "'full' (transformers' DynamicCache), 'none' (KVCache), 'quantized:BITS', 'quantized:KEY_BITS:VALUE_BITS', "
        "'quantized:FILE.json' (widths by layer), "
        "'codec:NAME' (a codec, 'codec:int4'), all but the first also with '@TOKENS' (max_length, 'quantized:4@64k'); "
        "'POLICY:BUDGET' (tokens or a share, 'h2o:1024', 'snapkv:0.25'), 'window:TOKENS', 'window:TOKENS:SINKS', "
        "'sparse:SELECTOR:BUDGET', 'sparse:SELECTOR:BUDGET:DENSE_LAYERS', 'lowrank:RANK', 'lowrank:SHARE:FILE', these "
        "also with '+BITSbits', '+KEY_BITS:VALUE_BITSbits' (not with lowrank) or '+CODEC'. "
        f"Policies: {names}, with {' or '.join(f'{name}-' for name in wrappers())} in front. "
        f"Selectors: {', '.join(selectors())}"
    )


def _dynamic(config: PreTrainedConfig) -> DynamicCache:
    cache = DynamicCache(config=config)
    with suppress(ValueError):  # this package has no cache for the model
        # transformers adds layers that run several times (Dory) when they come.
        more = len(KVCache(config, bind=False).layers) - len(cache.layers)
        cache.layers += [DynamicLayer() for _ in range(more)]
    return cache
