"""Mixed precision: each layer holds what it would hold in a cache where all layers have its width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kvcache import (
    HeavyHitterCache,
    KVCache,
    LatentKVCache,
    QuantizedKVCache,
    SlidingWindowCache,
    SparseReadCache,
)
from hf_kvcache.integration.versions import with_cache
from tests import families

PAGES = {"page_size": 16, "tail_length": 8}
Make = Callable[..., Any]

CACHES: dict[str, tuple[str, Make]] = {
    "quantized": ("llama", lambda config, **o: QuantizedKVCache(config, **PAGES, **o)),
    "offloaded": ("llama", lambda config, **o: QuantizedKVCache(config, offload="cpu", **PAGES, **o)),
    "allocated": ("llama", lambda config, **o: QuantizedKVCache(config, max_length=160, **PAGES, **o)),
    "evicting": ("llama", lambda config, **o: HeavyHitterCache(config, 60, "snapkv", **PAGES, **o)),
    "window": ("llama", lambda config, **o: SlidingWindowCache(config, 60, **PAGES, **o)),
    "sparse": ("llama", lambda config, **o: SparseReadCache(config, 40, dense_layers=0, **PAGES, **o)),
    "sparse evicting": (
        "llama",
        lambda config, **o: SparseReadCache(config, 40, budget=80, dense_layers=0, **PAGES, **o),
    ),
    "latents": ("deepseek_v3", lambda config, **o: LatentKVCache(config, **PAGES, **o)),
    "evicted latents": ("deepseek_v3", lambda config, **o: HeavyHitterCache(config, 60, "snapkv", **PAGES, **o)),
    "hybrid": ("qwen3_next", lambda config, **o: QuantizedKVCache(config, **PAGES, **o)),
    "shared": ("gemma3n", lambda config, **o: QuantizedKVCache(config, **PAGES, **o)),
}


def read(model: Any, cache: Any) -> Any:
    ids = torch.randint(3, 60, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, **with_cache(model, cache))
        model(input_ids=ids[:, :1], use_cache=True, **with_cache(model, cache))
    return cache


def storing(model: Any) -> list[int]:
    """The model's layers that hold keys and values, as a cache of one width names them."""
    return [layer.index for layer in KVCache(model.config, bind=False).own_layers]


#: The others differ from these in what the tests of their own look at.
FAST = ("quantized", "allocated", "evicting", "latents", "hybrid")


@pytest.mark.parametrize("name", [one if one in FAST else pytest.param(one, marks=pytest.mark.slow) for one in CACHES])
def test_a_layer_is_that_of_one_width(name: str, tmp_path: Path) -> None:
    family, make = CACHES[name]
    model = families.build(family)
    layers = storing(model)
    narrow, wide = ({"bits": 8}, {"bits": 4}) if "latents" in name else ({"bits": 2}, {"key_bits": 4, "value_bits": 3})
    entry = wide.get("bits", {"keys": 4, "values": 3})
    mixed = make(model.config, bits={"layers": {layers[0]: entry}, "default": narrow["bits"]}, skip_layers=[layers[-1]])
    read(model, mixed)
    mixed.integrity()
    first = read(model, make(model.config, **wide))
    assert repr(mixed.layers[layers[0]].options.codec) == repr(first.codec)
    # A prompt is attended to in full precision, so the first layer sees the same, whatever the others do.
    if name == "allocated":
        assert torch.equal(first.layers[layers[0]].tensors.records, mixed.layers[layers[0]].tensors.records)
        return
    expected, found = first.layers[layers[0]].tensors(), mixed.layers[layers[0]].tensors()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    kinds = [repr(mixed.layers[i].options.codec) for i in layers]
    assert "none" in kinds[-1] and len(set(kinds)) == min(len(layers), 3)
    report = mixed.memory()
    assert report.layers[layers[-1]].total > report.layers[layers[0]].total or len(layers) == 1
    mixed.save(tmp_path / "cache")
    again = KVCache.load(tmp_path / "cache", model.config)
    assert type(again) is type(mixed) and repr(again.codec) == repr(mixed.codec)
    restored = again.layers[layers[0]].tensors()
    assert all(torch.equal(restored[key], found[key]) for key in found)
    other = make(model.config, **narrow)
    with pytest.raises(ValueError, match=r"state was saved with codec="):
        other.load_state_dict(mixed.state_dict())
