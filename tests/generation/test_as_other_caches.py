"""Code that works with any transformers cache: it reads layers, iterates over the cache, and mixes dtypes."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from hf_kvcache.integration.versions import with_cache
from tests import families
from tests.generation.kinds import KINDS, filled
from tests.running import forward, full_cache, generate, prompt, small_cache


@pytest.mark.parametrize("kind", ["none", "sliding", "low rank", "latents"])
def test_keys_and_values_of_layers(kind: str) -> None:
    """With exact pages, ``cache.layers[i].keys`` equals that of a DynamicCache."""
    model, cache = filled(kind)
    theirs = full_cache(model)
    for ids in (prompt(60), *prompt(3).split(1, 1)):
        forward(model, ids, theirs)
    for ours, expected in zip(cache.layers, theirs.layers, strict=True):
        torch.testing.assert_close(ours.keys, expected.keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.values, expected.values, rtol=0, atol=1e-4)


def test_an_empty_layer_has_none() -> None:
    """The keys and values of an empty layer are None, as in a DynamicCache."""
    model = families.build("llama")
    assert small_cache(model).layers[0].keys is None


def test_evicted_tokens_are_no_tensor() -> None:
    """If each head holds other tokens, reading keys raises an error that says so."""
    _, cache = filled("snapkv")
    with pytest.raises(RuntimeError, match="layer 0 has evicted tokens"):
        cache.layers[0].keys.clone()


def test_iterating() -> None:
    """A DynamicCache can be built from an iteration over a cache of this package."""
    model, cache = filled("none")
    copy = DynamicCache(cache)
    expected = forward(model, prompt(1), cache)
    torch.testing.assert_close(forward(model, prompt(1), copy), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "deepseek_v3"])
@pytest.mark.parametrize("bound", [True, False])
def test_autocast(family: str, bound: bool) -> None:
    """Keys and values may have two dtypes. The output equals that of a DynamicCache up to the rounding of bfloat16."""
    model = families.build(family)
    ids = prompt(60)
    logits = []
    for cache in (small_cache(model, bind=bound), full_cache(model)):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            parts = [
                model(block, **with_cache(model, cache)).logits for block in (ids[:, :50], *ids[:, 50:].split(1, 1))
            ]
        logits.append(torch.cat(parts, 1).float())
    assert float((logits[0] - logits[1]).norm() / logits[1].norm()) < 0.03


@pytest.mark.parametrize("kind", ["rotated4", "snapkv", "latents"])
def test_generating_under_autocast(kind: str) -> None:
    """Generation works under autocast with packed, evicting and latent layers."""
    model = KINDS[kind].build()
    cache = KINDS[kind].cache(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generate(model, prompt(60), cache, 20).logits.isfinite().all()
    cache.integrity()


@pytest.mark.parametrize("codec", ["unbiased4", "rotated4"])
def test_pages_under_autocast_are_packed_in_full_precision(codec: str) -> None:
    """The same keys and values are packed to the same bytes with and without autocast."""
    states = torch.randn(2, 1, 2, 90, 16, generator=torch.Generator().manual_seed(0))
    records = []
    for enabled in (True, False):
        cache = small_cache(families.build("llama"), codec, bind=False)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled), torch.no_grad():
            for layer in range(2):
                cache.update(states[0], states[1], layer)
            records.append(cache.state_dict()["layers.0.records"])
    assert len(records[0]) and torch.equal(*records)
