"""One cache of every kind, each with its model. Tests of properties that every cache must have run on all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

from hf_kvcache import HeavyHitterCache, KVCache, LatentKVCache, SlidingWindowCache, SparseReadCache
from tests import families
from tests.lowrank.one_layer import rotated_cache
from tests.mla import families as mla_families
from tests.running import forward, prompt, small_cache

_EVICTING: dict[str, Any] = {"tail_length": 4, "page_size": 8, "interval": 8}


@dataclass(frozen=True)
class Kind:
    """How to build a new model, and an empty cache for it."""

    build: Callable[[], PreTrainedModel]
    cache: Callable[[PreTrainedModel], KVCache]


def _hitters(policy: str, model: PreTrainedModel) -> KVCache:
    return HeavyHitterCache(model.config, 28, policy, sink_length=2, **_EVICTING)


def _window(model: PreTrainedModel) -> KVCache:
    return SlidingWindowCache(model.config, 24, 2, reindex=True, **_EVICTING)


def _latent(model: PreTrainedModel) -> KVCache:
    return LatentKVCache(model.config, page_size=16, tail_length=8)


def _sparse(model: PreTrainedModel) -> KVCache:
    sizes = {"sink_length": 2, "tail_length": 4, "page_size": 8, "dense_layers": 1}
    return SparseReadCache(model.config, 0.5, bits=8, **sizes)


def _kind(family: str, cache: Callable[[PreTrainedModel], KVCache]) -> Kind:
    module = families if family in families.every_name() else mla_families
    return Kind(partial(module.build, family), cache)


KINDS = {
    "none": _kind("llama", small_cache),
    "rotated4": _kind("llama", partial(small_cache, codec="rotated4")),
    "sliding": _kind("gemma3", small_cache),
    "shared keys": _kind("gemma3n", small_cache),
    "recurrent": _kind("qwen3_next", small_cache),
    "convolutions": _kind("lfm2", small_cache),
    "snapkv": _kind("llama", partial(_hitters, "snapkv")),
    "h2o": _kind("llama", partial(_hitters, "h2o")),
    "reindexed": _kind("llama", _window),
    "latents": _kind("deepseek_v3", _latent),
    "evicted latents": _kind("deepseek_v3", partial(_hitters, "snapkv")),
    "indexed latents": _kind("deepseek_v32", _latent),
    "sparse": _kind("llama", _sparse),
    "low rank": _kind("llama", partial(rotated_cache, before_rope=True)),
}
if "indexed_attention" not in DYNAMIC_LAYER_TYPE_MAPPING:  # older releases have no cache for such layers
    del KINDS["indexed latents"]


def filled(kind: str, tokens: int = 60, steps: int = 3) -> tuple[PreTrainedModel, KVCache]:
    """A model, and its cache after a prompt and some decode steps."""
    model = KINDS[kind].build()
    cache = KINDS[kind].cache(model)
    forward(model, prompt(tokens), cache)
    decode(model, cache, steps)
    return model, cache


def decode(model: PreTrainedModel, cache: KVCache, steps: int = 20, seed: int = 0) -> torch.Tensor:
    """Logits of ``steps`` further tokens, one at a time."""
    return torch.cat([forward(model, token, cache) for token in prompt(steps, seed=seed).split(1, 1)], 1)
