"""Bad input is an error that names the argument, its value and accepted values, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from hf_kvcache import KVCache, QuantizedKVCache
from hf_kvcache.codecs import resolve
from tests import families
from tests.running import as_cache, assert_packed, forward, prompt, small_cache

CONFIG = transformers.LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4)

ARGUMENTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no such bits": (lambda: QuantizedKVCache(CONFIG, bits=5), ValueError, r"bits=5.*accepted.*4"),
    "zero bits": (lambda: QuantizedKVCache(CONFIG, bits=0), ValueError, r"bits=0.*accepted"),
    "fractional bits": (lambda: QuantizedKVCache(CONFIG, bits=3.5), ValueError, r"bits=3\.5.*accepted"),
    "text for bits": (lambda: QuantizedKVCache(CONFIG, bits="4"), ValueError, r"bits='4'.*accepted"),
    "true for bits": (lambda: QuantizedKVCache(CONFIG, bits=True), ValueError, r"bits=True.*accepted"),
    "no such key bits": (
        lambda: QuantizedKVCache(CONFIG, codec="int", key_bits=7),
        ValueError,
        r"key_bits=7.*accepted: 2",
    ),
    "no such value bits": (
        lambda: QuantizedKVCache(CONFIG, codec="kvarn", value_bits=1),
        ValueError,
        r"value_bits=1.*accepted",
    ),
    "bits twice": (
        lambda: QuantizedKVCache(CONFIG, bits=2, codec="int4"),
        ValueError,
        r"bits=2 contradicts codec='int4'",
    ),
    "bits of fp8": (lambda: QuantizedKVCache(CONFIG, bits=8, codec="fp8"), ValueError, r"bits=8.*'fp8'.*fixed"),
    "unknown codec": (lambda: KVCache(CONFIG, "zip4"), ValueError, r"codec='zip4'.*accepted.*int"),
    "codec of a wrong type": (lambda: KVCache(CONFIG, 4), TypeError, r"codec.*int.*accepted"),
    "unknown option": (
        lambda: KVCache(CONFIG, "int4", groups=8),
        TypeError,
        r"'groups'; did you mean 'group_size'.*'int4': group_size",
    ),
    "options of a ready codec": (lambda: KVCache(CONFIG, resolve("int4"), bits=4), ValueError, r"ready-made"),
    "page size": (lambda: KVCache(CONFIG, page_size=0), ValueError, r"page_size=0.*accepted.*8"),
    "odd page size": (lambda: KVCache(CONFIG, page_size=20), ValueError, r"page_size=20.*accepted: multiples of 8"),
    "tail length": (lambda: KVCache(CONFIG, tail_length=-1), ValueError, r"tail_length=-1.*accepted"),
    "fractional tail length": (lambda: KVCache(CONFIG, tail_length=1.5), ValueError, r"tail_length=1\.5.*accepted"),
    "sink length": (lambda: KVCache(CONFIG, sink_length=-4), ValueError, r"sink_length=-4.*accepted"),
    "key axis": (
        lambda: KVCache(CONFIG, "rotated4", key_axis="both"),
        ValueError,
        r"key_axis='both'.*accepted.*'token'",
    ),
    "legacy tuple": (
        lambda: KVCache(((torch.zeros(1), torch.zeros(1)),)),
        TypeError,
        r"config.*tuple.*accepted.*Legacy",
    ),
    "model in place of its config": (
        lambda: KVCache(torch.nn.Linear(1, 1)),
        TypeError,
        r"config.*Linear.*accepted: .*model\.config",
    ),
    "encoder only": (lambda: KVCache(transformers.BertConfig()), ValueError, r"'bert'.*accepted: models that generate"),
    "encoder only (RoBERTa)": (lambda: KVCache(transformers.RobertaConfig()), ValueError, r"'roberta'.*accepted"),
    "encoder only (vision)": (lambda: KVCache(transformers.ViTConfig()), ValueError, r"'vit'.*accepted"),
    "encoder only (ModernBERT)": (
        lambda: KVCache(transformers.ModernBertConfig()),
        ValueError,
        r"'modernbert'.*accepted",
    ),
    "encoder-decoder": (lambda: KVCache(transformers.T5Config()), ValueError, r"'t5'.*accepted: decoder-only"),
    "no attention layers": (
        lambda: KVCache(transformers.MambaConfig(num_hidden_layers=2)),
        ValueError,
        r"'mamba'.*accepted.*full_attention",
    ),
    "hybrid layers only": (
        lambda: KVCache(transformers.FalconH1Config()),
        ValueError,
        r"'falcon_h1'.*'hybrid'.*accepted.*full_attention",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case: str) -> None:
    """Bad arguments are refused when the cache is built, and no config is bound."""
    build, error, message = ARGUMENTS[case]
    with pytest.raises(error, match=message):
        build()
    assert str(CONFIG._attn_implementation) != "hf_kvcache"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 7}, r"group_size=7.*accepted"),
        ({"group_size": 12}, r"group_size=12.*page_size=16.*\[1, 2, 4, 8, 16\]"),
    ],
)
def test_group_size_that_does_not_divide(model: PreTrainedModel, options: dict[str, int], message: str) -> None:
    """Refused when the cache is built, since the config has the head dimension; the config stays unbound."""
    with pytest.raises(ValueError, match=message):
        small_cache(model, "int4", **options)
    assert str(model.config._attn_implementation) != "hf_kvcache"


def test_group_size_refused_at_the_first_update(model: PreTrainedModel) -> None:
    """Where the config has no head dimension, the first update is refused, and the cache stays empty."""
    cache = small_cache(model, resolve("int4", group_size=16))
    with pytest.raises(ValueError, match=r"group_size=16.*head_dim=24.*accepted"):
        cache.layers[0].update(torch.randn(1, 2, 3, 24), torch.randn(1, 2, 3, 24))
    assert cache.get_seq_length() == 0


def _keys(batch: int = 2, heads: int = 2, tokens: int = 1, dim: int = 16, **options: Any) -> torch.Tensor:
    return torch.randn(batch, heads, tokens, dim, **options)


def _nan() -> torch.Tensor:
    keys = _keys()
    keys[1, 0, 0, 3] = torch.nan
    return keys


CALLS: dict[str, tuple[Callable[[KVCache], Any], type[Exception], str]] = {
    "another batch": (
        lambda c: c.update(_keys(3), _keys(3), 0),
        ValueError,
        r"key_states.*\[3, 2, 1, 16\].*batch 2.*reset",
    ),
    "another head count": (lambda c: c.update(_keys(heads=4), _keys(heads=4), 0), ValueError, r"key_states.*2 heads"),
    "another head dim": (lambda c: c.update(_keys(dim=8), _keys(dim=8), 0), ValueError, r"key_states.*dim 16"),
    "another value dim": (lambda c: c.update(_keys(), _keys(dim=8), 0), ValueError, r"value_states.*dim 16"),
    "another dtype": (lambda c: c.update(_keys().half(), _keys().half(), 0), ValueError, r"float16.*float32"),
    "values of another dtype": (
        lambda c: c.update(_keys(), _keys().int(), 0),
        ValueError,
        r"float32.*int32.*accepted: one",
    ),
    "integers": (lambda c: c.update(_keys().int(), _keys().int(), 0), ValueError, r"int32.*accepted.*floating"),
    "two lengths": (lambda c: c.update(_keys(tokens=2), _keys(), 0), ValueError, r"key_states.*accepted: \[batch"),
    "no tokens": (
        lambda c: c.update(_keys(tokens=0), _keys(tokens=0), 0),
        ValueError,
        r"key_states.*at least one token",
    ),
    "three dimensions": (lambda c: c.update(_keys()[0], _keys()[0], 0), ValueError, r"key_states.*accepted: \[batch"),
    "a layer too many": (lambda c: c.update(_keys(), _keys(), 2), ValueError, r"layer_idx=2.*'llama'.*2 layers"),
    "a negative layer": (lambda c: c.update(_keys(), _keys(), -1), ValueError, r"layer_idx=-1.*2 layers"),
    "NaN keys": (lambda c: c.update(_nan(), _keys(), 0), ValueError, r"key_states of layer 0 holds NaN"),
    "infinite values": (
        lambda c: c.update(_keys(), _keys() / 0, 0),
        ValueError,
        r"value_states of layer 0 holds NaN or inf",
    ),
    "crop too far": (lambda c: c.crop(-61), ValueError, r"crop\(-61\).*-60 to 0"),
    "crop to a length": (lambda c: c.crop(30), ValueError, r"crop\(30\).*negative"),
    "reorder with a bad index": (
        lambda c: c.reorder_cache(torch.tensor([0, 2])),
        ValueError,
        r"beam_idx=\[0, 2\].*0 to 1",
    ),
    "reorder with a matrix": (
        lambda c: c.reorder_cache(torch.zeros(2, 2, dtype=torch.long)),
        ValueError,
        r"beam_idx.*accepted",
    ),
    "select a bad index": (lambda c: c.batch_select_indices(torch.tensor([5])), ValueError, r"indices=\[5\].*0 to 1"),
    "select by floats": (lambda c: c.batch_select_indices(torch.tensor([0.7])), ValueError, r"indices.*accepted"),
    "repeat no times": (lambda c: c.batch_repeat_interleave(0), ValueError, r"repeats=0.*accepted.*1"),
    "repeat by a fraction": (lambda c: c.batch_repeat_interleave(1.5), ValueError, r"repeats=1\.5.*accepted"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls(model: PreTrainedModel, case: str) -> None:
    """A refused call does not change the cache: it passes its checks, has the same length and gives the same logits."""
    call, error, message = CALLS[case]
    cache = small_cache(model, validate=True)
    forward(model, prompt(60, 2), cache)
    untouched = cache.fork()
    with pytest.raises(error, match=message):
        call(cache)
    assert_packed(cache)
    assert cache.get_seq_length() == 60 and cache.batch_size == 2
    new = prompt(3, 2, seed=5)
    assert torch.equal(forward(model, new, cache), forward(model, new, untouched))


@pytest.mark.parametrize("other", ["llama_mha", "qwen3", "gemma3"])
def test_cache_of_another_model(model: PreTrainedModel, other: str) -> None:
    """A filled cache is refused by a model with other heads, widths or more layers."""
    cache = small_cache(model)
    forward(model, prompt(60), cache)
    with pytest.raises(ValueError, match=r"layer 0 holds|built for"):
        forward(families.build(other), prompt(3), cache)
    cache.integrity()
    assert cache.get_seq_length() == 60


def test_new_cache_of_another_model(model: PreTrainedModel) -> None:
    """An empty cache is refused by a model with more layers than it was built for."""
    cache = small_cache(model)
    with pytest.raises(ValueError, match=r"'llama' model.*built for|built for a 'llama' model"):
        forward(families.build("gemma3"), prompt(3), cache)


def test_nan_is_not_checked_by_default(model: PreTrainedModel) -> None:
    """The check would stall a GPU at every step, so it is made only with ``validate=True``."""
    small_cache(model).update(_nan(), _keys(), 0)


def test_legacy_tuple_is_refused_by_generate(model: PreTrainedModel) -> None:
    """A bound model still raises transformers' own error."""
    small_cache(model)
    with pytest.raises(ValueError, match="Passing a tuple"):
        model.generate(prompt(5), **as_cache(((torch.zeros(1), torch.zeros(1)),)), max_new_tokens=2)


def test_dropout_is_refused(model: PreTrainedModel) -> None:
    """Attention over packed pages has no dropout."""
    from hf_kvcache.integration.attention import attention_function

    cache = small_cache(model)
    forward(model, prompt(60), cache)
    handles = cache.update(_keys(1), _keys(1), 0)
    with pytest.raises(ValueError, match=r"dropout=0\.5.*accepted: 0\.0"):
        attention_function(model.model.layers[0].self_attn, _keys(1, 4), *handles, None, dropout=0.5)
