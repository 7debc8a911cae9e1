"""Cache specs and the methods that are made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, PreTrainedModel

from hf_kvcache import HeavyHitterCache, KVCache, LatentKVCache, codecs
from hf_kvcache.eviction import registry
from hf_kvcache.integration.model_identity import model_identity
from hf_kvcache.lowrank.basis import LayerBasis, SideBasis
from hf_kvcache.lowrank.projection import Projection
from hf_kvcache_eval.caches import Method, kinds
from hf_kvcache_eval.protocol import Protocol
from hf_kvcache_eval.specs import parse, split


@pytest.mark.parametrize(
    ("text", "name", "budget", "codec", "options"),
    [
        ("full", "full", None, None, {}),
        ("kvarn3", "kvarn3", None, None, {}),
        ("random@0.3", "random", 0.3, None, {}),
        ("snapkv@0.3+int4", "snapkv", 0.3, "int4", {}),
        ("window@8", "window", 8, None, {}),
        ("rotated4:key_axis=token;group_size=32", "rotated4", None, None, {"key_axis": "token", "group_size": 32}),
        ("quantized:key_bits=4;center=true;p=0.5", "quantized", None, None, {"key_bits": 4, "center": True, "p": 0.5}),
    ],
)
def test_a_spec_is_parsed(text: str, name: str, budget: float | None, codec: str | None, options: dict) -> None:
    spec = parse(text)
    assert (spec.name, spec.budget, spec.codec, spec.options) == (name, budget, codec, options)
    assert spec.text == text


@pytest.mark.parametrize(
    "text", ["", "@0.3", "int4:", "int4:group_size", "a b", "random@0", "random@1.5", "int4+", "x@."]
)
def test_a_bad_spec_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"cache=|budget="):
        parse(text)


@given(
    st.lists(st.sampled_from(["full", "int4", "random@0.3", "a:b=1;c=2"]), min_size=1),
    st.sampled_from([",", " ", ", "]),
)
def test_a_list_keeps_order_and_drops_repeats(words: list[str], separator: str) -> None:
    assert split(separator.join(words)) == list(dict.fromkeys(words))


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match="caches=' , '"):
        split(" , ")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("zip", "no cache 'zip'; accepted: full.*snapkv.*eviction policies with .*ada-.* in front"),
        ("ada-zip@0.3", "no cache 'ada-zip'"),
        ("snapkv-ada@0.3", "no cache 'snapkv-ada'"),
        ("ada@0.3", "no cache 'ada'"),
        ("random", "needs"),
        ("ada-snapkv", "needs"),
        ("int4@0.3", "takes no budget"),
        ("int4+int8", "takes no codec"),
        ("full:dtype=int7", "accepted: float32, bfloat16"),
    ],
)
def test_an_arm_says_what_is_wrong_with_its_spec(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Method(text)


@pytest.mark.parametrize("text", ["full:bits=4", "window@8:x=1", "ada-snapkv@0.3:x=1", "hf-fp8:x=1"])
def test_options_that_a_cache_does_not_have_are_refused(text: str, model: PreTrainedModel) -> None:
    with pytest.raises((ValueError, TypeError), match=r"no option|unexpected argument"):
        Method(text).make(model.config, Protocol())


def test_every_codec_is_a_method() -> None:
    assert set(codecs.specs()) | set(codecs.available()) <= set(kinds())


def test_every_policy_is_a_method_and_every_wrapper_goes_in_front() -> None:
    for policy in registry.available():
        for name in (policy, *(f"{wrapper}-{policy}" for wrapper in registry.wrappers())):
            kind = Method(f"{name}@0.3+int4").kind
            assert kind.rows and kind.budget and kind.after_prefill and kind.queries
            assert kind.shares_prefill == (policy != "gate")  # which has to see the model read
    assert not Method("int4").kind.queries


def test_latents_are_found_by_name(model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of ``hf-kvcache calibrate`` by its name, cut to the share that stands where others have a budget."""
    monkeypatch.setenv("HF_KVCACHE_PROJECTIONS", str(tmp_path))
    method = Method("latent@0.5+unbiased4:projection=mine;spread=uniform")
    with pytest.raises(ValueError, match=r"projection='mine' is not in .*found there: none.*hf-kvcache calibrate"):
        method.make(model.config, Protocol())
    width, layers = model.config.head_dim, model.config.num_hidden_layers
    eye = torch.eye(width).expand(model.config.num_key_value_heads, -1, -1)
    side = SideBasis(eye, eye, torch.full(eye.shape[:2], 1 / width))
    bases = {layer: LayerBasis(side, side, len(eye)) for layer in range(layers)}
    Projection(bases, "svd", {}, model_identity(model.config)).save(tmp_path / "mine.safetensors")
    cache = method.make(model.config, Protocol())
    assert isinstance(cache, LatentKVCache) and cache.codec.name == "unbiased"
    latents = cache.options.latents
    assert isinstance(latents, dict) and {layer.keys.rank for layer in latents.values()} == {width // 2}
    whole = Method("latent:projection=mine").make(model.config, Protocol()).options.latents
    assert whole[0].keys.rank == width


@pytest.mark.parametrize(
    ("text", "policy", "budget", "sinks", "tail", "page"),
    [
        ("snapkv@0.3", "snapkv", 0.3, 4, 8, 64),
        ("window@0.3", "streaming", 0.3, 4, 8, 64),
        ("ada-window@1024", "ada", 1024, 4, 8, 64),
        ("window@8", "streaming", 8, 4, 4, 64),
        ("random@3", "random", 3, 3, 0, 64),
        ("keydiff@0.2:tail_length=128;page_size=32", "keydiff", 0.2, 4, 128, 32),
    ],
)
def test_an_evicting_arm_has_the_protocols_sinks_and_a_short_tail(
    model: PreTrainedModel, text: str, policy: str, budget: float, sinks: int, tail: int, page: int
) -> None:
    cache = Method(text).make(model.config, Protocol())
    eviction = cache.options.eviction
    assert isinstance(cache, HeavyHitterCache) and eviction is not None
    assert (eviction.policy.name, eviction.budget.amount) == (policy, budget)
    assert (cache.options.sink_length, cache.options.tail_length, cache.options.page_size) == (sinks, tail, page)
    assert eviction.evict_prefill is None and eviction.interval is None


def test_the_spec_says_how_and_when_an_arm_evicts(model: PreTrainedModel) -> None:
    protocol = Protocol(sink_length=2, tail_length=8, page_size=16, seed=3)
    cache = Method("snapkv@0.3+unbiased4:window=16;interval=64;evict_prefill=end").make(model.config, protocol)
    eviction = cache.options.eviction
    assert cache.codec.name == "unbiased" and eviction.policy.window == 16 and eviction.seed == 3
    assert (eviction.interval, eviction.evict_prefill) == (64, "end")
    assert (cache.options.sink_length, cache.options.tail_length, cache.options.page_size) == (2, 8, 16)


def test_an_arm_follows_the_protocol_and_its_own_options(model: PreTrainedModel) -> None:
    protocol = Protocol(sink_length=2, tail_length=24, page_size=16)
    cache = Method("int4:tail_length=40").make(model.config, protocol)
    assert isinstance(cache, KVCache)
    assert (cache.options.sink_length, cache.options.tail_length, cache.options.page_size) == (2, 40, 16)
    assert cache.codec.name == "int"


def test_the_full_arm_is_transformers_own_cache_in_the_dtype_named(model: PreTrainedModel) -> None:
    assert type(Method("full").make(model.config, Protocol())) is DynamicCache
    assert Method("full").dtype is None
    assert Method("full:dtype=bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("field", ["sink_length", "tail_length", "page_size", "block", "seed"])
def test_a_protocol_refuses_what_is_no_count(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=-1; accepted"):
        Protocol(**{field: -1})
