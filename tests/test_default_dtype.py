"""Caches compute the same whatever torch's default dtype is: kernels write float32 to the memory they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hf_kvcache import HeavyHitterCache, KVCache, LatentKVCache, SparseReadCache
from tests import families
from tests.mla import families as mla_families
from tests.running import prompt

_SMALL: dict[str, Any] = {"sink_length": 2, "tail_length": 8, "page_size": 8}
_MAKERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "pages": ("llama", lambda config: KVCache(config, "int4", **_SMALL)),
    "sparse": ("llama", lambda config: SparseReadCache(config, 32, "quest", dense_layers=1, **_SMALL)),
    "evicting": ("llama", lambda config: HeavyHitterCache(config, 32, "h2o", codec="int4", **_SMALL)),
    "latents": ("deepseek_v32", lambda config: LatentKVCache(config, "int8", **_SMALL)),
}


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    """With memory twice as large as kernels take it to be, mistakes give other numbers and no crash."""
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", _MAKERS)
def test_default_dtype(name: str, float64_by_default: None) -> None:
    """A prompt, single tokens and a few at once."""
    family, make = _MAKERS[name]
    model = (mla_families if name == "latents" else families).build(family)
    ids, found = prompt(64), []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        cache = make(model.config)
        with torch.inference_mode():
            parts = [ids[:, :50], *ids[:, 50:60].split(1, 1), ids[:, 60:]]
            found.append(torch.cat([model(part, past_key_values=cache).logits for part in parts], 1))
    assert torch.equal(*found)
