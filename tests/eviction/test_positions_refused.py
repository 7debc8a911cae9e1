"""Policies that undo rotary positions, for models where that cannot be done: refused at once, with what works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from hf_kvcache import HeavyHitterCache, SlidingWindowCache
from hf_kvcache.eviction import available, resolve
from tests.running import full_cache, generate, prompt

SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}


def qwen2_vl() -> transformers.PreTrainedConfig:
    text = {**SHAPE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    return transformers.Qwen2VLConfig(text_config=text, vision_config=vision)


def dynamic() -> transformers.PreTrainedConfig:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    return transformers.LlamaConfig(**SHAPE, rope_parameters=scaling)


@pytest.mark.parametrize(
    ("config", "why"), [(qwen2_vl(), "several positions"), (dynamic(), "rope_type='dynamic'")], ids=["mrope", "dynamic"]
)
@pytest.mark.parametrize("policy", [name for name in available() if resolve(name).needs_rope])
def test_refused_when_the_cache_is_built(config: transformers.PreTrainedConfig, why: str, policy: str) -> None:
    with pytest.raises(
        ValueError, match=rf"policy={policy}\(.*undoes rotary positions.*{why}.*accepted here: .*'snapkv'"
    ):
        HeavyHitterCache(config, 64, policy)
    with pytest.raises(ValueError, match=rf"streaming\(reindex=True\).*{why}"):
        SlidingWindowCache(config, 64, reindex=True)
    assert "hf_kvcache" not in str(config.get_text_config(decoder=True)._attn_implementation)


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "rkv", "streaming"])
def test_others_work_with_several_positions_a_token(policy: str) -> None:
    """A budget that drops nothing is decoding as usual; one that drops half goes on."""
    config = qwen2_vl()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen2VLForConditionalGeneration._from_config(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    sizes: dict[str, Any] = {"sink_length": 2, "tail_length": 4, "page_size": 8, "interval": 8}
    plain = generate(model, prompt(40), full_cache(model), new=10)
    kept = generate(model, prompt(40), HeavyHitterCache(model.config, 200, policy, **sizes), new=10)
    assert torch.equal(kept.tokens, plain.tokens)
    cache = HeavyHitterCache(model.config, 20, policy, **sizes)
    assert generate(model, prompt(40), cache, new=10).logits.isfinite().all()
    assert cache.layers[0].evictor.evictions > 0
