"""The caches that every family is tried with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from hf_kvcache import HeavyHitterCache, KVCache, LatentKVCache, QuantizedKVCache, SlidingWindowCache

#: Pages so small that short prompts fill some.
_PAGES: dict[str, Any] = {"page_size": 16, "tail_length": 8}
_SIZES: dict[str, Any] = {**_PAGES, "sink_length": 4}
INTERVAL = 16
#: More tokens than any sequence has: an evicting cache drops nothing, and has to equal one that keeps everything.
ROOMY = 1000
#: Fewer tokens than the prompts have.
BUDGET = 32

Make = Callable[[PreTrainedConfig], KVCache]


@dataclass(frozen=True)
class Kind:
    """A cache under trial.

    Attributes:
        name: column of the table.
        make: makes a cache from a model's config that keeps every token.
        bound: largest difference of logits from those of ``DynamicCache``, as a share of their spread; 0 for rounding
            errors only.
        edge: largest difference from the same cache with sums in another order: rounding may change a code or a scale
            to the next value.
        small: makes the same cache with a budget that a prompt exceeds; None for caches that keep every token.
        waits: whether the cache evicts only when ``compress(model, input_ids)`` is called.
        modes: the modes that the cache is tried in; all if empty.
        pointless: text of the error for models that have no use for the cache.
    """

    name: str
    make: Make
    bound: float = 0.0
    edge: float = 0.0
    small: Make | None = None
    waits: bool = False
    modes: tuple[str, ...] = ()
    pointless: str | None = None


#: Modes in which evicting caches differ; all modes are tried with ``none``.
_EVICTING_MODES = (
    "greedy",
    "image",
    "padded batch",
    "prompt lookup",
    "chunked prefill",
    "crop",
    "batch operations",
    "copies",
    "state dict",
)
_LOSSY_MODES = (
    "greedy",
    "image",
    "padded batch",
    "prompt lookup",
    "chunked prefill",
    "continued",
    "crop",
    "batch operations",
    "copies",
    "state dict",
)


def _evicting(policy: str, name: str, waits: bool = False) -> Kind:
    options: dict[str, Any] = dict(_SIZES) if waits else {**_SIZES, "interval": INTERVAL}

    def make(budget: int) -> Make:
        return lambda config: HeavyHitterCache(config, budget, policy, **options)

    modes = tuple(
        mode for mode in _EVICTING_MODES if not (waits and mode == "state dict")
    )  # such a cache waits for compress()
    return Kind(name, make(ROOMY), small=make(BUDGET), waits=waits, modes=modes)


def _window(name: str, reindex: bool) -> Kind:
    def make(window: int) -> Make:
        return lambda config: SlidingWindowCache(config, window, reindex=reindex, interval=INTERVAL, **_PAGES)

    return Kind(name, make(ROOMY), small=make(BUDGET - 4), modes=_EVICTING_MODES)


KINDS: tuple[Kind, ...] = (
    Kind("none", lambda config: KVCache(config, "none", **_SIZES)),
    Kind("8 bits", lambda config: QuantizedKVCache(config, bits=8, **_SIZES), bound=0.2, edge=0.01, modes=_LOSSY_MODES),
    Kind("4 bits", lambda config: QuantizedKVCache(config, bits=4, **_SIZES), bound=0.8, edge=0.15, modes=_LOSSY_MODES),
    _evicting("snapkv", "attention"),
    _evicting("h2o", "accumulated"),
    _evicting("keydiff", "keys"),
    _evicting("expected", "rotary"),
    _evicting("kvzip", "replay", waits=True),
    _window("window", reindex=False),
    _window("re-indexed", reindex=True),
    Kind("latents", lambda config: LatentKVCache(config, **_SIZES), pointless="caches keys and values, not latents"),
)


def dynamic(model: PreTrainedModel) -> Cache:
    """transformers' own cache, which is the reference."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))
