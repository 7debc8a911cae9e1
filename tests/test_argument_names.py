"""Unknown arguments are errors that name the argument and the one that was probably meant."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import transformers

from hf_kvcache import HeavyHitterCache, KVCache, LatentKVCache, QuantizedKVCache, SlidingWindowCache
from hf_kvcache.codecs import resolve
from tests import families

CONFIG = transformers.LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4)
MLA = families.build("deepseek_v3").config

MAKE: dict[str, Callable[..., KVCache]] = {
    "KVCache": lambda **o: KVCache(CONFIG, **o),
    "QuantizedKVCache": lambda **o: QuantizedKVCache(CONFIG, **o),
    "HeavyHitterCache": lambda **o: HeavyHitterCache(CONFIG, 64, **o),
    "HeavyHitterCache of 4 bits": lambda **o: HeavyHitterCache(CONFIG, 64, bits=4, **o),
    "HeavyHitterCache of latents": lambda **o: HeavyHitterCache(MLA, 64, bits=8, **o),
    "SlidingWindowCache": lambda **o: SlidingWindowCache(CONFIG, 64, **o),
    "LatentKVCache": lambda **o: LatentKVCache(MLA, **o),
    "LatentKVCache, calibrated": lambda **o: LatentKVCache(CONFIG, projection="no such file", **o),
}


@pytest.mark.parametrize("cache", MAKE)
def test_a_misspelled_argument_is_named(cache: str) -> None:
    """The error does not take it for an option of the codec, and comes before the config is bound."""
    name = cache.split()[0].rstrip(",")
    message = rf"{name} got an unexpected argument 'tail_lenght'; did you mean 'tail_length'\? Accepted: .*page_size"
    for config in (CONFIG, MLA):
        config._attn_implementation = "sdpa"
    with pytest.raises(TypeError, match=message) as error:
        MAKE[cache](tail_lenght=8)
    assert "codec 'none' has no option" not in str(error.value)
    assert "hf_kvcache" not in (str(CONFIG._attn_implementation), str(MLA._attn_implementation))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KVCache(CONFIG, "int4", groups=8), r"'groups'; did you mean 'group_size'.*codec 'int4': group_size"),
        (lambda: HeavyHitterCache(CONFIG, 64, windw=3), r"did you mean 'window'.*policy 'snapkv': kernel, window"),
        (lambda: HeavyHitterCache(CONFIG, 64, "ada-h2o", kernel=3), r"policy 'ada-h2o': floor, normalize"),
        (lambda: HeavyHitterCache(CONFIG, 64, zzz=3), r"'zzz'\. Accepted: config, budget, policy"),
        (lambda: SlidingWindowCache(CONFIG, 64, reindx=True), r"did you mean 'reindex'"),
        (lambda: LatentKVCache(MLA, rotary_code="none"), r"did you mean 'rotary_codec'"),
    ],
)
def test_accepted_arguments_are_listed(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("cls", [QuantizedKVCache, HeavyHitterCache, SlidingWindowCache, LatentKVCache])
def test_signatures_list_the_common_arguments(cls: type[KVCache]) -> None:
    """For editors and type checkers, the arguments of every cache are in every signature, with the same types."""
    common, own = inspect.signature(KVCache).parameters, inspect.signature(cls).parameters
    for name in ("tail_length", "page_size", "validate", "bind"):
        assert own[name].annotation == common[name].annotation
    assert "sink_length" in own or "sinks" in own


def test_options_reach_the_codec_and_the_policy() -> None:
    assert repr(KVCache(CONFIG, "int4", group_size=8).codec) == repr(resolve("int4", group_size=8))
    assert repr(QuantizedKVCache(CONFIG, key_bits=4, value_bits=2).codec) == repr(
        resolve("auto", key_bits=4, value_bits=2)
    )
    cache = HeavyHitterCache(CONFIG, 64, "ada-snapkv", "rotated", 4, key_axis="token", kernel=3, floor=0.5)
    assert repr(cache.policy) == "ada(policy=snapkv(window=64, kernel=3), floor=0.5)"
    assert repr(cache.codec) == repr(resolve("rotated4", key_axis="token"))
    mixed = HeavyHitterCache(CONFIG, 64, bits=4, value_bits=2).codec
    assert (mixed.key_bits, mixed.value_bits) == (4, 2)
    window = SlidingWindowCache(CONFIG, 64, codec="int8", group_size=8, evict_prefill="end", pin=(8, 12))
    assert window.options.eviction is not None and window.options.eviction.evict_prefill == "end"
    with pytest.raises(ValueError, match="ready-made"):
        HeavyHitterCache(CONFIG, 64, codec=resolve("int4"), group_size=8)
    with pytest.raises(ValueError, match=r"value_bits=5; accepted: \[1, 2, 3, 4, 8\]"):
        HeavyHitterCache(CONFIG, 64, bits=4, value_bits=5)
