"""Caches of latents in tests, and the families that they run over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from transformers import Cache, PreTrainedModel

from hf_kvcache import LatentKVCache, unbind
from tests.mla.families import names
from tests.running import Generated, assert_packed, full_cache, generate

#: Families that use a cache most differently: scaled scores, an indexer, shared latents, sliding windows.
FEW = [name for name in ("deepseek_v3", "deepseek_v32", "mistral_large4-sharing", "dots3_note") if name in names()]


def some(fast: list[str] = FEW, without: Iterable[str] = ()) -> list[Any]:
    """All families but ``without``, for parametrization; those that are not among the ``fast`` are ``slow``."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names(without=without)]


def unbind_model(model: PreTrainedModel) -> None:
    """Unbind the text part of a model."""
    unbind(model.config.get_text_config(decoder=True))


def latent(model: PreTrainedModel, **options: Any) -> LatentKVCache:
    """A cache with pages so small that a prompt of 40 tokens fills one."""
    return LatentKVCache(model.config, **{"page_size": 16, "tail_length": 16, "sink_length": 4, **options})


def expanding(model: PreTrainedModel) -> list[Any]:
    """The attention modules that cache latents."""
    return [module for module in model.modules() if hasattr(module, "expand_kv")]


def assert_absorbed(cache: Cache, model: PreTrainedModel, steps: int) -> None:
    """All layers that cache latents read them without expanding them in at least ``steps`` forward passes."""
    assert isinstance(cache, LatentKVCache)
    assert cache.absorbed_steps >= steps * len(expanding(model))


def both(model: PreTrainedModel, inputs: Any, new: int = 24, **options: Any) -> tuple[Generated, Generated]:
    """Generated with a cache of latents, and with transformers' own cache."""
    theirs = generate(model, inputs, full_cache(model), new, **options)
    ours = generate(model, inputs, latent(model), new, **options)
    assert_packed(ours.cache)
    return ours, theirs
