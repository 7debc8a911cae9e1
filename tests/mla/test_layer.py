"""Layers of latents: bytes, long blocks, other attention implementations, saving, bad input."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from hf_kvcache import KVCache, LatentKVCache, unbind
from tests import families
from tests.mla import families as mla_families
from tests.running import as_cache, assert_same, forward, full_cache, generate, prompt

SIZES: dict[str, Any] = {"page_size": 16, "tail_length": 16, "sink_length": 4}
#: More tokens than attention absorbs in these models, whose latents are 32 wide.
LONG = 80


def small(config: Any, **options: Any) -> LatentKVCache:
    return LatentKVCache(config, **{**SIZES, **options})


@pytest.mark.parametrize(
    ("options", "share", "error"), [({"bits": 8}, 0.58, 1e-2), ({"bits": 4}, 0.36, 1e-1)], ids=["8", "4"]
)
def test_bytes_and_error_at_full_width(options: dict[str, Any], share: float, error: float) -> None:
    """DeepSeek's widths (512 + 64): bytes held at 16,384 tokens, and the error of what is read."""
    config = transformers.DeepseekV2Config(num_hidden_layers=1)
    cache = LatentKVCache(config, **options)
    torch.manual_seed(0)
    latents, rotary = torch.randn(1, 1, 16384, 512).bfloat16(), torch.randn(1, 1, 16384, 64).bfloat16()
    handles = cache.update(latents, rotary, 0)
    cache.layers[0].flush()
    report = cache.memory()
    assert report.full_bf16 == 16384 * 576 * 2
    assert report.total <= share * report.full_bf16
    for handle, given_states in zip(handles, (latents, rotary), strict=True):
        decoded = handle.dense().float()
        assert float((decoded - given_states).norm() / given_states.float().norm()) <= error
    unbind(config)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v32", "dots3_note", "glm5_next"])
def test_long_blocks_are_expanded_in_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is too long to be absorbed is expanded tile by tile, and equals DynamicCache."""
    monkeypatch.setattr("hf_kvcache.layers.mla._TILE_TOKENS", 32)
    model = mla_families.shared(name)
    cache, reference = small(model.config), full_cache(model)
    ids = prompt(120 + LONG, 2)
    for part in (ids[:, :120], ids[:, 120:]):
        got, wanted = forward(model, part, cache), forward(model, part, reference)
    assert cache.memory().packed_elements > 0 and cache.absorbed_steps == 0
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("bind", [False, True])
def test_other_attention_reads_what_it_expands(attention: str, bind: bool) -> None:
    """Without this package's attention, or unbound later, handles are expanded whole: right, with nothing absorbed."""
    model = mla_families.build("deepseek_v3", attention=attention)
    cache = small(model.config, bind=bind)
    if bind:
        unbind(model.config)
    ids = prompt(70)
    outputs = [model(part, **as_cache(cache)).logits for part in ids.split([50, 12, 1, 1, 6], 1)]
    wanted = model(ids, **as_cache(full_cache(model))).logits
    torch.testing.assert_close(torch.cat(outputs, 1), wanted, rtol=0, atol=1e-4)
    assert cache.absorbed_steps == 0
    unbind(model.config)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v32"])
def test_saved_and_loaded(name: str) -> None:
    """A loaded cache continues as the saved one does, with the indexer's keys and the packed codes."""
    model = mla_families.shared(name)
    cache, other = small(model.config, bits=8), small(model.config, bits=8)
    ids = prompt(60, 2)
    forward(model, ids, cache)
    other.load_state_dict({key: x.clone() for key, x in cache.state_dict().items()})
    for token in prompt(6, 2).split(1, 1):
        torch.testing.assert_close(forward(model, token, other), forward(model, token, cache), rtol=0, atol=0)
    assert other.absorbed_steps > 0


def test_a_fork_changes_nothing() -> None:
    """A fork that continues changes neither the latents nor the indexer's keys of its origin."""
    model = mla_families.shared("deepseek_v32")
    cache, reference = small(model.config), full_cache(model)
    forward(model, prompt(50), cache)
    forward(model, prompt(50), reference)
    fork = cache.fork()
    forward(model, prompt(5, seed=3), fork)
    for ids in prompt(20, seed=4).split([7, *[1] * 13], 1):
        torch.testing.assert_close(forward(model, ids, cache), forward(model, ids, reference), rtol=0, atol=1e-4)


def test_two_caches_of_one_family() -> None:
    """Unbinding one model leaves another of the class bound; unbinding the last gives the class its method back."""
    first, second = mla_families.build("minicpm3"), mla_families.build("minicpm3")
    attention = type(first.model.layers[0].self_attn)
    own = attention.expand_kv
    caches = [small(model.config) for model in (first, second)]
    assert attention.expand_kv is not own
    unbind(first.config)
    assert attention.expand_kv is not own
    second(prompt(30), **as_cache(caches[1]))
    second(prompt(1), **as_cache(caches[1]))
    assert caches[1].absorbed_steps == 2
    unbind(second.config)
    assert attention.expand_kv is own


def test_a_model_that_is_gone() -> None:
    """A model that is deleted without being unbound does not leave its class bound."""
    model = mla_families.build("minicpm3")
    attention = type(model.model.layers[0].self_attn)
    own = attention.expand_kv
    small(model.config)
    assert attention.expand_kv is not own
    del model
    gc.collect()
    assert attention.expand_kv is own


def test_a_plain_cache_expands() -> None:
    """``KVCache`` of a model with latents gives the same tokens."""
    model = mla_families.shared("youtu")
    assert_same(
        generate(model, prompt(50), KVCache(model.config, **SIZES)), generate(model, prompt(50), full_cache(model))
    )


def test_a_module_that_does_not_expand() -> None:
    """Attention to latents as if they were keys is refused."""
    model = mla_families.build("deepseek_v2")
    cache = small(model.config)
    forward(model, prompt(20), cache)
    keys, values = cache.update(torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 8), 0)
    from hf_kvcache.integration.attention import attention_function

    module = families.build("llama").model.layers[0].self_attn
    with pytest.raises(RuntimeError, match=r"caches latents, and LlamaAttention attends.*accepted"):
        cache.layers[0].expansion = None
        attention_function(module, torch.randn(1, 4, 1, 32), keys, values, None)


@pytest.mark.parametrize("length", [1, LONG])
def test_no_gradient(length: int) -> None:
    """A backward pass through stored latents is an error, in both ways of reading them."""
    model = mla_families.build("deepseek_v2")
    cache = small(model.config)
    forward(model, prompt(40), cache)
    logits = model(prompt(length), **as_cache(cache)).logits
    with pytest.raises(RuntimeError, match="no gradient"):
        logits.sum().backward()


LLAMA = families.build("llama").config
ERRORS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "bits": (lambda config: LatentKVCache(config, bits=5), r"bits=5.*accepted: \[4, 8\]"),
    "projection": (
        lambda config: LatentKVCache(config, projection="x"),
        r"projection='x'.*caches latents of its own; accepted: None",
    ),
    "rank": (lambda config: LatentKVCache(config, rank=8), r"rank=8.*accepted: None"),
    "ratio": (lambda config: LatentKVCache(config, ratio=0.5), r"ratio=0.5.*accepted: None"),
    "codec": (lambda config: LatentKVCache(config, "int7"), r"bits=7.*accepted|key_bits=7.*accepted"),
    "group": (lambda config: LatentKVCache(config, "rotated4", group_size=48), r"group_size=48 does not divide"),
    "no latents": (lambda config: LatentKVCache(LLAMA), r"'llama' caches keys and values, not latents; accepted"),
    "rotary": (lambda config: LatentKVCache(LLAMA, rotary_codec="int8"), r"rotary_codec='int8'.*'llama'.*accepted"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input(case: str) -> None:
    """Bad arguments are refused when the cache is built, and nothing is bound."""
    config = mla_families.build("deepseek_v2").config
    build, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        build(config)
    assert str(config._attn_implementation) != "hf_kvcache"
