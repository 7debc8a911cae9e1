"""Models of which some layers read the keys of others: tokens go once all layers have read them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_kvcache import HeavyHitterCache
from hf_kvcache.layers.evicting import EvictingLayer
from tests import families
from tests.families import WINDOW
from tests.running import ROUNDING, assert_same, forward, full_cache, generate, left_padded, prompt

FAMILIES = ["gemma3n", "gemma4"]
SIZES: dict[str, Any] = {"sink_length": 2, "tail_length": 4, "page_size": 8, "interval": 8}


def evicting(model: PreTrainedModel, budget: int, policy: str = "snapkv", **options: Any) -> HeavyHitterCache:
    return HeavyHitterCache(model.config, budget, policy, **SIZES, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["snapkv", "h2o"])
def test_a_budget_for_all_is_plain_decoding(family: str, policy: str) -> None:
    """In a padded batch too, by chunks, and one by one until pages fill up."""
    model, batch = families.build(family), left_padded([prompt(40, seed=1), prompt(23, seed=2)])
    plain = generate(model, batch, full_cache(model), new=20)
    cache = evicting(model, 1000, policy)
    assert_same(generate(model, batch, cache, new=20), plain)
    cache.integrity()
    assert_same(generate(model, batch, evicting(model, 1000, policy), new=20, prefill_chunk_size=16), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_is_what_all_layers_read(family: str) -> None:
    """After an eviction, decoding is as with a full cache under a mask that hides what has gone, in every layer."""
    model, ids = families.build(family), prompt(60)
    cache, full = evicting(model, 20, "streaming"), full_cache(model)
    whole = forward(model, ids[:, :50], full)
    torch.testing.assert_close(forward(model, ids[:, :50], cache), whole, rtol=0, atol=ROUNDING)
    (layer,) = (layer for layer in cache.layers if isinstance(layer, EvictingLayer))
    for at in range(50, 60):
        kept = layer.kept_positions()[0, 0].tolist()
        assert len(kept) <= 20 + SIZES["interval"] and max(kept) == at - 1
        seen = torch.zeros(1, 1, 1, at + 1, dtype=torch.bool)
        seen[..., [*kept, at]] = True
        length, offset = full.get_mask_sizes(1, 0)
        window = torch.arange(offset, offset + length) > at - WINDOW
        masks = {"full_attention": seen, "sliding_attention": window[None, None, None]}
        ours = forward(model, ids[:, at : at + 1], cache)
        theirs = forward(model, ids[:, at : at + 1], full, attention_mask=masks)  # type: ignore[arg-type]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)
    assert layer.evictor is not None and layer.evictor.evictions > 1


def test_what_would_have_to_see_more_is_refused() -> None:
    model = families.build("gemma3n")
    with pytest.raises(ValueError, match=r"compensate=8 with a config of 'gemma3n_text'.*accepted: 0"):
        evicting(model, 20, compensate=8)
    with pytest.raises(ValueError, match=r"policy=kvzip.*'gemma3n_text'.*accepted"):
        HeavyHitterCache(model.config, 64, "kvzip")
    with pytest.raises(ValueError, match=r"drafts"):
        generate(model, prompt(40), evicting(model, 20), prompt_lookup_num_tokens=3)
