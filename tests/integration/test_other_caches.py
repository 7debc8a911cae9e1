"""For other caches a bound model gives bit for bit what it gives unbound."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from hf_kvcache import KVCache, bind, unbind
from tests import families
from tests.choosing import pairwise
from tests.running import as_cache, left_padded, prompt

CASES = [
    (family, attention)
    for family in ("llama", "gemma3", "gpt_oss", "gemma2", "llava", "gemma3_vlm", "gemma4", "qwen3_next", "deepseek_v3")
    for attention in ("sdpa", "eager")
    # No soft-capping and no learned sinks in sdpa.
    if attention == "eager" or family not in ("gpt_oss", "gemma2")
]


def _cache(kind: str, model: PreTrainedModel) -> Cache | None:
    config = model.config.get_text_config(decoder=True)
    if kind == "static":
        return StaticCache(config=config, max_cache_len=64)
    return DynamicCache(config=config) if kind == "dynamic" else None


@torch.no_grad()
def _logits(model: PreTrainedModel, kind: str, padded: bool, **options: Any) -> list[torch.Tensor]:
    inputs = left_padded([prompt(20), prompt(40)]) if padded else {"input_ids": prompt(40, 2)}
    cache = _cache(kind, model)
    parts = [inputs["input_ids"]] if cache is None else inputs["input_ids"].split([30, 1, 9], 1)
    logits, seen = [], 0
    for part in parts:
        seen += part.shape[1]
        mask = {"attention_mask": inputs["attention_mask"][:, :seen]} if padded else {}
        logits.append(model(part, **as_cache(cache), use_cache=cache is not None, **mask, **options).logits)
    return logits


@pairwise("case, kind, padded", CASES, ["none", "dynamic", "static"], [False, True])
def test_bit_for_bit(case: tuple[str, str], kind: str, padded: bool) -> None:
    """Logits with the config bound are those of the unbound model, and again after unbinding."""
    family, attention = case
    model = families.build(family, attention)
    config = model.config.get_text_config(decoder=True)
    before = _logits(model, kind, padded)
    bind(config)
    assert str(config._attn_implementation) == "hf_kvcache"
    bound = _logits(model, kind, padded)
    unbind(config)
    assert str(config._attn_implementation) == attention and type(config._attn_implementation) is str
    after = _logits(model, kind, padded)
    for one, two, three in zip(before, bound, after, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("keep", [0, 1, 5])
def test_models_that_look_at_the_name(keep: int) -> None:
    """Gemma 4 decides by the implementation's name whether the last layers may compute the last tokens only."""
    model = families.build("gemma4", "sdpa")
    before = _logits(model, "dynamic", False, logits_to_keep=keep)
    bind(model.config)
    for one, two in zip(before, _logits(model, "dynamic", False, logits_to_keep=keep), strict=True):
        assert torch.equal(one, two)


def test_both_caches_in_turn(model: PreTrainedModel) -> None:
    """A model may serve a KVCache and a DynamicCache alternately."""
    ids = prompt(60)
    expected = _stepwise(model, ids, DynamicCache(config=model.config))
    ours, theirs = KVCache(model.config, page_size=16, tail_length=8), DynamicCache(config=model.config)
    for cut in (slice(0, 50), slice(50, 51), slice(51, 60)):
        with torch.no_grad():
            one = model(ids[:, cut], **as_cache(ours), use_cache=True).logits
            two = model(ids[:, cut], **as_cache(theirs), use_cache=True).logits
        assert torch.equal(two, expected[:, cut])
        torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


@torch.no_grad()
def _stepwise(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    steps = [model(part, **as_cache(cache), use_cache=True).logits for part in ids.split([50, 1, 9], 1)]
    return torch.cat(steps, 1)


@pytest.mark.parametrize("family", ["llama", "gemma3_vlm"])
def test_copied_model(family: str) -> None:
    """A copy of a bound model is bound by a config of its own, and can be unbound alone."""
    model = families.build(family)
    KVCache(model.config)
    other = copy.deepcopy(model)
    configs = [m.config.get_text_config(decoder=True) for m in (model, other)]
    assert [c._attn_implementation for c in configs] == ["hf_kvcache"] * 2
    for one, two in zip(_logits(model, "dynamic", True), _logits(other, "dynamic", True), strict=True):
        assert torch.equal(one, two)
    unbind(configs[1])
    assert [str(c._attn_implementation) for c in configs] == ["hf_kvcache", "sdpa"]
