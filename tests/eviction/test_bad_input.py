"""Bad input to evicting caches: an error that says what is accepted, and nothing that is held is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from hf_kvcache import HeavyHitterCache, KVCache, SlidingWindowCache, unbind
from hf_kvcache.eviction import resolve
from tests.eviction.test_generation import evicting
from tests.running import as_cache, forward, prompt

CONFIG = transformers.LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4)

ARGUMENTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "budget of nothing": (lambda: HeavyHitterCache(CONFIG, 0), ValueError, r"budget=0.*accepted: from 36 tokens"),
    "budget of a half": (lambda: HeavyHitterCache(CONFIG, 1.5), ValueError, r"budget=1\.5.*accepted.*share"),
    "budget in words": (lambda: HeavyHitterCache(CONFIG, "all"), ValueError, r"budget='all'.*accepted"),
    "pins beyond the budget": (lambda: HeavyHitterCache(CONFIG, 64, pin=(0, 60)), ValueError, r"budget=64.*from 96"),
    "pin": (lambda: HeavyHitterCache(CONFIG, 64, pin=(5, 2)), ValueError, r"pin=\(5, 2\).*accepted"),
    "policy": (lambda: HeavyHitterCache(CONFIG, 64, "h20"), ValueError, r"policy='h20'.*accepted: .*h2o"),
    "policy of a wrong type": (lambda: HeavyHitterCache(CONFIG, 64, 3), TypeError, r"policy.*int.*accepted"),
    "option": (lambda: HeavyHitterCache(CONFIG, 64, windows=3), TypeError, r"windows"),
    "option of the policy": (lambda: HeavyHitterCache(CONFIG, 64, window=0), ValueError, r"window=0.*accepted"),
    "option of a ready policy": (
        lambda: HeavyHitterCache(CONFIG, 64, resolve("snapkv"), window=3),
        TypeError,
        r"window",
    ),
    "bits": (lambda: HeavyHitterCache(CONFIG, 64, bits=5), ValueError, r"bits=5.*accepted"),
    "evict_prefill": (
        lambda: HeavyHitterCache(CONFIG, 64, evict_prefill="start"),
        ValueError,
        r"evict_prefill='start'.*accepted: 'chunk', 'end', None",
    ),
    "interval": (lambda: HeavyHitterCache(CONFIG, 64, interval=0), ValueError, r"interval=0.*accepted.*1"),
    "seed": (lambda: HeavyHitterCache(CONFIG, 64, seed=-1), ValueError, r"seed=-1.*accepted"),
    "replay with interval": (
        lambda: HeavyHitterCache(CONFIG, 64, "kvzip", interval=64),
        ValueError,
        r"interval=64.*'kvzip' waits for compress\(model, input_ids\).*accepted: None",
    ),
    "replay by chunk": (
        lambda: HeavyHitterCache(CONFIG, 64, "kvzip", evict_prefill="chunk"),
        ValueError,
        r"evict_prefill='chunk'.*'kvzip'.*accepted: None",
    ),
    "window": (lambda: SlidingWindowCache(CONFIG, 8), ValueError, r"window=8.*accepted.*32"),
    "sinks": (lambda: SlidingWindowCache(CONFIG, 64, -1), ValueError, r"sinks=-1.*accepted"),
    "budget of a window": (lambda: SlidingWindowCache(CONFIG, 64, budget=9), TypeError, r"budget=9.*window and sinks"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case: str) -> None:
    """Refused when the cache is built, which then binds no config."""
    build, error, message = ARGUMENTS[case]
    with pytest.raises(error, match=message):
        build()
    assert str(CONFIG._attn_implementation) != "hf_kvcache"


def test_groups_smaller_than_a_page(model: PreTrainedModel) -> None:
    """Scales that some tokens of a page share could not go with them."""
    cache = evicting(model, codec="int4", group_size=4)
    with pytest.raises(ValueError, match=r"codec=.*page of 8.*accepted with eviction"):
        forward(model, prompt(40), cache)


COMPRESS: dict[str, tuple[Callable[[PreTrainedModel, HeavyHitterCache], Any], str]] = {
    "without a model": (lambda m, c: c.compress(), r"'kvzip' reads the context again; give model and input_ids"),
    "without the context": (lambda m, c: c.compress(m), r"give model and input_ids"),
    "with a part of it": (lambda m, c: c.compress(m, prompt(30)), r"\(1, 30\).*accepted: \[1, 40\]"),
    "with more rows": (lambda m, c: c.compress(m, prompt(40, 2)), r"\(2, 40\).*accepted: \[1, 40\]"),
    "with a mask too long": (
        lambda m, c: c.compress(m, prompt(40), torch.ones(1, 41)),
        r"attention_mask of shape \(1, 41\).*accepted: \(1, 40\)",
    ),
}


@pytest.mark.parametrize("case", COMPRESS)
def test_compress(model: PreTrainedModel, case: str) -> None:
    call, message = COMPRESS[case]
    cache = evicting(model, "kvzip", interval=None)
    forward(model, prompt(40), cache)
    untouched = cache.fork()
    with pytest.raises(ValueError, match=message):
        call(model, cache)
    assert torch.equal(forward(model, prompt(3), cache), forward(model, prompt(3), untouched))


def test_compress_what_keeps_everything(model: PreTrainedModel) -> None:
    cache = KVCache(model.config)
    forward(model, prompt(40), cache)
    with pytest.raises(ValueError, match=r"keeps every token; accepted: caches with a budget"):
        cache.compress()


def test_compress_twice(model: PreTrainedModel) -> None:
    """The second reading needs the whole context."""
    cache = evicting(model, "kvzip", interval=None)
    forward(model, prompt(40), cache)
    cache.compress(model, prompt(40))
    with pytest.raises(ValueError, match=r"has evicted already"):
        cache.compress(model, prompt(40))


@pytest.mark.parametrize("policy", ["snapkv", "knorm"])
def test_an_attention_that_gives_no_queries(model: PreTrainedModel, policy: str) -> None:
    """Unbound after the cache was built: the next update says what to do, and a fork made before goes on."""
    cache = evicting(model, policy)
    forward(model, prompt(60), cache)
    untouched = cache.fork()
    unbind(model.config)
    with pytest.raises(RuntimeError, match=r"set_attn_implementation\('hf_kvcache'\)"), torch.no_grad():
        model(prompt(3), **as_cache(cache), use_cache=True)
    assert untouched.layers[1].kept_positions().shape == cache.layers[1].kept_positions().shape
    untouched.integrity()
    assert forward(model, prompt(3), untouched).isfinite().all()


def test_unbound(model: PreTrainedModel) -> None:
    """``bind=False`` leaves another attention in place: the error comes with the first forward."""
    cache = evicting(model, bind=False)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"'sdpa' does not give.*bind\(model.config\)"):
        model(prompt(60), **as_cache(cache), use_cache=True)
