"""SmolLM2 gives the tokens of the full cache, and the strings that transformers' own cache tests expect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf_kvcache import KVCache, QuantizedKVCache
from hf_kvcache.cli.models import load_default_model
from hf_kvcache.cli.sample_text import packaged_text
from tests.running import as_cache, assert_packed

pytestmark = pytest.mark.slow
SERIES = ["A sequence: 1, 2, 3, 4, 5", "A sequence: A, B, C"]


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """Model and tokenizer of the default model, which a package carries."""
    torch.set_num_threads(2)
    model, tokenizer = load_default_model()
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    yield model, tokenizer
    torch.set_num_threads(1)


def _text() -> str:
    return packaged_text()[0]


def test_full_equality(smollm2: Any) -> None:
    """With ``codec="none"``, 40 tokens after a prompt of 400 equal those of DynamicCache, and attention reads pages."""
    model, tokenizer = smollm2
    ids = tokenizer(_text()[5000:8000], return_tensors="pt").input_ids[:, :400]
    assert ids.shape[1] == 400
    expected = model.generate(ids, **as_cache(DynamicCache(config=model.config)), max_new_tokens=40, do_sample=False)
    cache = KVCache(model.config, "none")
    ours = model.generate(ids, **as_cache(cache), max_new_tokens=40, do_sample=False)
    assert_packed(cache)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("spec", ["none", "int8", "auto"])
def test_series_go_on(smollm2: Any, spec: str) -> None:
    """The model continues both series, with small pages that are packed early. Additional padding has no effect."""
    model, tokenizer = smollm2
    texts = []
    for padding in ({"padding": True}, {"padding": "max_length", "max_length": 40}):
        inputs = tokenizer(SERIES, return_tensors="pt", **padding)
        cache = QuantizedKVCache(model.config, codec=spec, page_size=8, tail_length=0, sink_length=1)
        out = model.generate(**inputs, **as_cache(cache), max_new_tokens=10, do_sample=False)
        assert_packed(cache)
        texts.append(tokenizer.batch_decode(out, skip_special_tokens=True))
    assert texts[0] == texts[1]
    assert texts[0][0].startswith("A sequence: 1, 2, 3, 4, 5, 6, 7, 8")
    assert texts[0][1].startswith("A sequence: A, B, C, D, E, F, G, H")
