"""Eviction of latents, against a cache whose single KV head has latents and rotary keys as its keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config, LlamaConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention
from transformers.models.llama.modeling_llama import LlamaAttention

from hf_kvcache import HeavyHitterCache, SlidingWindowCache
from hf_kvcache.eviction import available, resolve
from hf_kvcache.integration.attention import attention_function
from hf_kvcache.layers.evicting import EvictingLayer
from hf_kvcache.layers.evicting_mla import EvictingLatentLayer
from tests.eviction.toys import small_options
from tests.mla import families as mla_families
from tests.running import assert_same, forward, full_cache, generate, left_padded, prompt

HEADS, NOPE, ROPE, VALUE, RANK = 4, 16, 8, 24, 32
SIZES: dict[str, Any] = {"budget": 24, "page_size": 8, "sink_length": 2, "tail_length": 4, "interval": 8}


def fitting() -> list[str]:
    """The policies that depend only on attention, keys and values."""
    needs = ("needs_rope", "needs_output", "needs_replay", "needs_hidden", "moves_sinks")
    return [name for name in available() if not any(getattr(resolve(name), need) for need in needs)]


def latent_module() -> DeepseekV2Attention:
    torch.manual_seed(0)
    config = DeepseekV2Config(
        hidden_size=64,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_hidden_layers=1,
        q_lora_rank=None,
        kv_lora_rank=RANK,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=VALUE,
    )
    config._attn_implementation = "sdpa"
    module = DeepseekV2Attention(config, 0).eval()
    torch.nn.init.normal_(module.kv_b_proj.weight, std=RANK**-0.5)
    return module


def absorbed_module() -> LlamaAttention:
    """An attention module whose one KV head is as wide as a latent with its rotary key."""
    config = LlamaConfig(num_attention_heads=HEADS, num_key_value_heads=1, head_dim=RANK + ROPE, num_hidden_layers=1)
    config._attn_implementation = "sdpa"
    return LlamaAttention(config, 0).eval()


def small(config: Any, policy: str, **options: Any) -> HeavyHitterCache:
    return HeavyHitterCache(config, policy=policy, **{**SIZES, **small_options(policy), **options})


#: A codec's noise may change a close choice, so codecs are tested with policies that do not depend on states.
CASES = [*((name, "none") for name in fitting()), ("streaming", "rotated8"), ("random", "rotated8")]


@pytest.mark.parametrize(("policy", "codec"), CASES)
@torch.no_grad()
def test_keeps_what_one_wide_head_would_keep(policy: str, codec: str) -> None:
    """The same tokens stay, and outputs are the same up to rounding: a prompt, a chunk, and single tokens."""
    mine, other = latent_module(), absorbed_module()
    cache, reference = small(mine.config, policy, codec=codec), small(other.config, policy)
    by_head = mine.kv_b_proj.weight.view(HEADS, NOPE + VALUE, RANK)
    for length in (40, 12, 80, *[1] * 30):  # 80: more than is absorbed unless attention sums are needed
        query = torch.randn(1, HEADS, length, NOPE + ROPE)
        latents, rotary = torch.randn(1, 1, length, RANK), torch.randn(1, 1, length, ROPE)
        wide = torch.einsum("bhqn,hnr->bhqr", query[..., :NOPE], by_head[:, :NOPE])
        wide = torch.cat([wide, query[..., NOPE:]], -1)
        expanded = mine.expand_kv(*cache.update(latents, rotary, 0))
        got, _ = attention_function(mine, query, *expanded, None, scaling=mine.scaling)
        handles = reference.update(torch.cat([latents, rotary], -1), latents, 0)
        weighted, _ = attention_function(other, wide, *handles, None, scaling=mine.scaling)
        wanted = torch.einsum("bqhr,hvr->bqhv", weighted, by_head[:, NOPE:])
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 if codec == "none" else 0.02)
        assert torch.equal(kept(cache), kept(reference))
    layer = cache.layers[0]
    assert isinstance(layer, EvictingLatentLayer) and layer.absorbed
    assert policy == "keepall" or (layer.evictor is not None and layer.evictor.evictions)
    cache.integrity()


def kept(cache: HeavyHitterCache) -> torch.Tensor:
    layer = cache.layers[0]
    assert isinstance(layer, EvictingLayer)
    return layer.kept_positions()


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "streaming"])
def test_generates(policy: str) -> None:
    """A large budget equals DynamicCache; with a small one, rows of a padded batch keep what they keep alone."""
    model = mla_families.build("deepseek_v3")
    rows = [prompt(44), prompt(31)]
    inputs = left_padded(rows)
    theirs = generate(model, inputs, full_cache(model), new=16)
    roomy = generate(model, inputs, small(model.config, policy, budget=500), new=16)
    assert_same(roomy, theirs)
    together = generate(model, inputs, small(model.config, policy), new=16)
    for row, ids in enumerate(rows):
        alone = generate(model, ids, small(model.config, policy), new=16)
        torch.testing.assert_close(together.logits[row], alone.logits[0], rtol=0, atol=1e-4)
        assert isinstance(alone.cache, HeavyHitterCache) and isinstance(together.cache, HeavyHitterCache)
        count = (kept(alone.cache) >= 0).sum()
        assert count <= SIZES["budget"] + SIZES["interval"]
        shift = inputs["input_ids"].shape[1] - ids.shape[1]
        assert torch.equal(kept(together.cache)[row, 0, :count] - shift, kept(alone.cache)[0, 0, :count])


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "streaming"])
def test_drafts_are_rolled_back(policy: str) -> None:
    """Prompt lookup gives the tokens of plain decoding, with evictions in between."""
    model = mla_families.build("deepseek_v2")
    ids = prompt(9).repeat(1, 2)
    plain = generate(model, ids, small(model.config, policy), new=40)
    drafted = generate(model, ids, small(model.config, policy), new=40, prompt_lookup_num_tokens=3)
    assert torch.equal(plain.tokens, drafted.tokens)
    assert isinstance(drafted.cache, HeavyHitterCache)
    assert all(layer.evictor.evictions for layer in drafted.cache.layers)


def test_window() -> None:
    """A sliding window of latents holds sinks and the newest tokens."""
    model = mla_families.build("youtu")
    cache = SlidingWindowCache(model.config, 24, sinks=2, tail_length=4, interval=8, page_size=8)
    forward(model, prompt(60), cache)
    assert kept(cache).flatten().tolist() == [0, 1, *range(36, 60)]


def test_refused() -> None:
    """Refused are policies that need positions, output projections or a replay, and layers with an indexer."""
    config = mla_families.build("deepseek_v2").config
    for policy in ("expected", "critical-snapkv", "compactor"):
        with pytest.raises(ValueError, match=r"policy=.*does not go with latents.*accepted"):
            small(config, policy)
    with pytest.raises(ValueError, match=r"compensate=8 does not go with latents.*accepted: 0"):
        small(config, "snapkv", compensate=8)
    with pytest.raises(ValueError, match=r"does not go with latents \(needs replay\)"):
        HeavyHitterCache(config, 64, "kvzip")
    with pytest.raises(ValueError, match=r"indexer chooses.*accepted|at least one of .'full_attention'"):
        small(mla_families.build("deepseek_v32").config, "snapkv")


def test_queries_need_a_plain_projection() -> None:
    """Where the up-projection is more than a matrix, only policies that do not look at queries run."""

    class Wrapped(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    model = mla_families.build("deepseek_v2")
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = Wrapped(layer.self_attn.kv_b_proj)
    with pytest.raises(RuntimeError, match=r"'snapkv' looks at queries.*accepted here: 'streaming'"):
        forward(model, prompt(20), small(model.config, "snapkv"))
    cache = small(model.config, "streaming")
    for ids in prompt(70).split([60, *[1] * 10], 1):
        forward(model, ids, cache)
    assert not any(layer.absorbed for layer in cache.layers) and kept(cache).shape[2] < 60
