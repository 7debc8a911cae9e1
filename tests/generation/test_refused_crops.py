"""A ``crop`` that layers of transformers' own cannot follow raises an error, and changes no layer."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests import families
from tests.generation.kinds import decode
from tests.running import forward, prompt, small_cache


def attention_first() -> PreTrainedModel:
    """A tiny LFM2 that begins with a layer of attention, which a ``crop`` comes to before the convolutions."""
    config = families.build("lfm2").config
    order = ["full_attention", "conv", "full_attention"]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict() | {"layer_types": order})).eval()


MODELS = {
    "recurrent": lambda: families.build("qwen3_next"),
    "recurrent, with attention between": lambda: families.build("jamba"),
    "convolutions": attention_first,
}


@pytest.mark.parametrize(
    ("name", "recording", "message"),
    [
        ("recurrent", True, r"crop\(-2\): layer 0 .*recurrent state.*accepted: 0, or reset\(\)"),
        ("recurrent, with attention between", False, r"crop\(-2\): layer 0 .*recurrent state"),
        ("convolutions", False, r"crop\(-2\): layer 1 .*does not track past states.*activate_past_recording\(\)"),
    ],
)
def test_nothing_is_changed(name: str, recording: bool, message: str) -> None:
    """The cache goes on as a copy does that was never cropped."""
    model = MODELS[name]()
    cache = small_cache(model)
    forward(model, prompt(40), cache)
    if recording:
        cache.activate_past_recording()
        decode(model, cache, 5, seed=1)
    other, seen = cache.fork(), cache.get_seq_length()
    with pytest.raises(RuntimeError, match=message):
        cache.crop(-2)
    assert cache.get_seq_length() == seen
    cache.integrity()
    if recording:
        cache.crop(0)
        other.crop(0)
    assert torch.equal(decode(model, cache, 5, seed=2), decode(model, other, 5, seed=2))


def test_convolutions_return_to_earlier_tokens() -> None:
    """Without recurrent states a cropped cache goes on as one that never held the tokens."""
    model = attention_first()
    cache, fewer = small_cache(model), small_cache(model)
    for each in (cache, fewer):
        forward(model, prompt(40), each)
    cache.activate_past_recording()
    decode(model, cache, 5, seed=1)
    cache.crop(-5)
    torch.testing.assert_close(decode(model, cache, 5, seed=2), decode(model, fewer, 5, seed=2), rtol=0, atol=1e-5)
