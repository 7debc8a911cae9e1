"""Models that use a cache in unusual ways: they work, or they are refused."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING
from transformers.masking_utils import sdpa_mask

from hf_kvcache import HeavyHitterCache, KVCache, LatentKVCache, QuantizedKVCache, SlidingWindowCache
from hf_kvcache.integration.architecture import architecture, modeling_file
from hf_kvcache.integration.attention import check_registration
from hf_kvcache.integration.output_projection import output_weight
from hf_kvcache.layers.mla import LatentLayer
from tests import families
from tests.integration.families_outside import OUTSIDE, build, known
from tests.mla import families as mla_families
from tests.running import (
    as_cache,
    assert_packed,
    assert_same,
    forward,
    full_cache,
    generate,
    left_padded,
    prompt,
    small_cache,
    teacher_forced,
)

_SIZES = {"page_size": 16, "tail_length": 8, "sink_length": 4}


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt_bigcode", "gptj", "codegen", "ctrl", "dbrx", "jetmoe", *OUTSIDE, "diffllama", "doge"]
)
def test_equals_dynamic_cache(name: str) -> None:
    """Logits are those of a DynamicCache, with other names in the config and with attention outside the interface."""
    model = build(name)
    ids = prompt(60)
    expected = teacher_forced(model, ids, full_cache(model), 45)
    cache = small_cache(model)
    torch.testing.assert_close(teacher_forced(model, ids, cache, 45), expected, rtol=0, atol=1e-4)
    assert_packed(cache)


@pytest.mark.parametrize("name", [*OUTSIDE, "diffllama", "deepseek_v3"])
def test_padded_rows_equal_solo(name: str) -> None:
    """Padding is not stored for models that read dense tensors either: a row of a batch is packed as it is alone."""
    model = families.build(name) if name == "deepseek_v3" else build(name)
    rows = [prompt(40, seed=1), prompt(25, seed=2)]
    batch = generate(model, left_padded(rows), QuantizedKVCache(model.config, bits=4, **_SIZES), 8)
    for index, row in enumerate(rows):
        solo = generate(model, row, QuantizedKVCache(model.config, bits=4, **_SIZES), 8)
        torch.testing.assert_close(batch.logits[index], solo.logits[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("cache", [lambda c: HeavyHitterCache(c, 64), lambda c: SlidingWindowCache(c, 64)])
def test_eviction_is_refused_when_built(name: str, cache: Any) -> None:
    """A model that attends by itself shows no queries. The error names a cache that works."""
    config = build(name).config
    with pytest.raises(ValueError, match=rf"'{name}'.*attends by itself.*QuantizedKVCache\(config, bits=4\)"):
        cache(config)
    assert str(config._attn_implementation) != "hf_kvcache"


@pytest.mark.parametrize("name", ["diffllama", "doge"])
def test_eviction_is_refused_at_the_first_forward(name: str) -> None:
    """Where the model's code does not show it, the first forward pass does."""
    model = build(name)
    with pytest.raises(RuntimeError, match=r"layer 0: .*ForCausalLM of transformers.*QuantizedKVCache"):
        forward(model, prompt(20), HeavyHitterCache(model.config, 64))


@pytest.mark.skipif(
    "indexed_attention" not in DYNAMIC_LAYER_TYPE_MAPPING, reason="this transformers has other layers there"
)
def test_eviction_with_an_indexer_is_refused() -> None:
    """The reason is the indexer, not a sliding window, and a cache that works is named."""
    config = mla_families.build("glm_moe_dsa").config
    with pytest.raises(ValueError, match=r"indexer chooses.*LatentKVCache\(config\)"):
        HeavyHitterCache(config, 64)
    model = mla_families.build("glm_moe_dsa")
    generate(model, prompt(20), KVCache(model.config), 2)


@pytest.mark.parametrize(
    "config",
    [
        lambda: transformers.OpenAIGPTConfig(n_embd=64, n_layer=2, n_head=4),
        lambda: transformers.XLNetConfig(d_model=64, n_layer=2, n_head=4),
        lambda: transformers.RwkvConfig(hidden_size=64, num_hidden_layers=2),
        lambda: transformers.ReformerConfig(is_decoder=True),
        lambda: transformers.XLMConfig(is_decoder=True),
    ],
    ids=["openai-gpt", "xlnet", "rwkv", "reformer", "xlm"],
)
@pytest.mark.parametrize("cache", [KVCache, lambda config: HeavyHitterCache(config, 64)])
def test_models_without_a_cache_are_refused(config: Any, cache: Any) -> None:
    """A cache that would stay empty is not built."""
    with pytest.raises(ValueError, match=r"config of '.*accepted: models"):
        cache(config())


def test_any_cache_of_a_model_with_latents_holds_latents() -> None:
    """Any cache of a model with multi-head latent attention holds latents, and ``bits`` are those of the latents."""
    model = families.build("deepseek_v3")
    quantized, plain = QuantizedKVCache(model.config, **_SIZES), KVCache(model.config, **_SIZES)
    for cache in (quantized, plain):
        assert all(isinstance(layer, LatentLayer) for layer in cache.layers)
    assert repr(quantized.codec) == repr(LatentKVCache(model.config, bits=4).codec)
    assert_same(generate(model, prompt(60), plain), generate(model, prompt(60), full_cache(model)))
    with pytest.raises(ValueError, match=r"bits=\[2, 4\]: latents"):
        QuantizedKVCache(model.config, key_bits=4, value_bits=2)


@pytest.mark.skipif(not known("sarvam_mla"), reason="this transformers has no Sarvam")
def test_class_of_another_family() -> None:
    """The modeling file is that of the model's class, not one named after its config: Sarvam uses DeepSeek V3's."""
    model = build("sarvam_mla")
    assert modeling_file(model.config).endswith("modeling_deepseek_v3")
    cache = LatentKVCache(model.config, **_SIZES)
    assert_same(generate(model, prompt(60), cache), generate(model, prompt(60), full_cache(model)))
    assert cache.absorbed_steps > 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "deepseek_v3"])
@pytest.mark.parametrize("bits", [None, 8])
@torch.no_grad()
def test_attention_weights(name: str, bits: int | None) -> None:
    """``output_attentions=True`` gives the weights at every step, as with a DynamicCache."""
    model = families.build(name, "eager") if name in families.every_name() else build(name, "eager")
    cache = small_cache(model) if bits is None else QuantizedKVCache(model.config, bits=bits, **_SIZES)
    inputs, seen = left_padded([prompt(50), prompt(40)]), 0
    theirs = full_cache(model)
    for length in (30, 1, 1, 18):
        seen += length
        part = {
            "input_ids": inputs["input_ids"][:, seen - length : seen],
            "attention_mask": inputs["attention_mask"][:, :seen],
            "output_attentions": True,
        }
        ours, expected = (model(**part, **as_cache(held)) for held in (cache, theirs))
        assert len(ours.attentions) == len(expected.attentions) == model.config.num_hidden_layers
        real = inputs["attention_mask"][:, seen - length : seen].bool()
        for one, other in zip(ours.attentions, expected.attentions, strict=True):
            difference = (one - other).transpose(1, 2)[real].abs().max()
            assert difference < (1e-5 if bits is None else 0.1)
    assert_packed(cache)


def test_attention_weights_of_evicting_caches() -> None:
    """They are refused at the first forward pass, since evicted tokens have no weights."""
    model = families.build("llama", "eager")
    with pytest.raises(ValueError, match=r"output_attentions=True.*accepted: caches that keep every token"):
        forward(model, prompt(20), HeavyHitterCache(model.config, 64), output_attentions=True)


def test_a_warning_when_generate_drops_the_cache(caplog: pytest.LogCaptureFixture) -> None:
    """Phi-3 drops the cache at the length where its frequencies change."""
    model = build("phi3")
    transformers.logging.get_logger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        cache = small_cache(model)
        model.generate(prompt(50), **as_cache(cache), max_new_tokens=10, do_sample=False)
        assert "drops the cache" not in caplog.text
        cache.reset()
        model.generate(prompt(50), **as_cache(cache), max_new_tokens=30, do_sample=False)
    assert "'phi3' changes its rotary embedding after 64 tokens" in caplog.text
    assert cache.get_seq_length() == 64


def test_a_long_prompt_keeps_the_cache() -> None:
    """A prompt that is longer than that length from the start stays in the cache."""
    model = build("phi3")
    ours = generate(model, prompt(100), small_cache(model))
    assert ours.cache.get_seq_length() == 119
    expected = model.generate(prompt(100), max_new_tokens=20, do_sample=False)
    assert torch.equal(ours.tokens, expected[:, 100:])


@pytest.mark.skipif(not known("dory"), reason="this transformers has no Dory")
@pytest.mark.parametrize("mode", ["per_loop", "last_loop"])
def test_layers_that_run_twice(mode: str) -> None:
    """Dory's repeated layers have keys for each run or share the last ones; sizes, states and copies are right."""
    model = build("dory", recurrent_kv_cache_mode=mode)
    expected = generate(model, prompt(60), full_cache(model))
    cache = small_cache(model)
    assert_same(generate(model, prompt(60), cache), expected)
    assert {layer.get_seq_length() for layer in cache.layers} == {79}
    assert len(cache.layers) == len({layer.index for layer in cache.own_layers}) == (6 if mode == "per_loop" else 4)
    restored = small_cache(model)
    restored.load_state_dict(cache.state_dict())
    logits = [forward(model, prompt(5), held) for held in (cache.fork(), restored)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)


def test_output_projection_of_modernbert() -> None:
    """The output projection is found by any of its names."""
    model = build("modernbert_decoder")
    module = model.model.layers[0].attn
    assert output_weight(module, 16).shape == (64, 64)


def test_handles_that_are_not_read() -> None:
    """A model that does not read the handles gets an error at the second forward pass, with its name and release."""
    model = families.build("llama")
    cache = small_cache(model)
    AttentionInterface.register("ignores_keys", lambda module, query, *args, **kwargs: (query.transpose(1, 2), None))
    AttentionMaskInterface.register("ignores_keys", sdpa_mask)
    model.config._attn_implementation = "ignores_keys"
    ids = prompt(20)
    with torch.no_grad(), pytest.raises(RuntimeError, match=rf"layer 0.*LlamaForCausalLM.*{transformers.__version__}"):
        for part in ids.split([18, 1, 1], 1):
            model(part, **as_cache(cache))


def test_every_architecture_is_found() -> None:
    """For all families of the other tests the storing classes are found, and all attend through the interface."""
    for name in families.every_name():
        model: PreTrainedModel = families.build(name)
        found = architecture(model.config.get_text_config(decoder=True))
        assert found is not None and found.storing and found.takes_cache and not found.outside, name
        attending = {type(module) for module in model.modules()} & set(found.storing)
        assert attending, name


def test_functions_that_are_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a release's models do not find the registered functions, building the cache fails and names the release."""
    config, modeling = families.build("qwen2").config, sys.modules["transformers.models.qwen2.modeling_qwen2"]
    check_registration.cache_clear()
    monkeypatch.setattr(AttentionInterface, "get_interface", lambda self, name, default: default)
    with pytest.raises(
        RuntimeError, match=rf"{modeling.__name__} of transformers {transformers.__version__}.*attention"
    ):
        KVCache(config)
    assert str(config._attn_implementation) == "sdpa"
    monkeypatch.undo()
    KVCache(config)
