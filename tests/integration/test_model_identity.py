"""Telling models apart by their config and by their weights."""

from __future__ import annotations

import pytest
import torch

from hf_kvcache.integration.model_identity import check_identity, check_weights, model_identity, sample_weights
from tests import families


def test_configs_tell_kinds_of_models_apart() -> None:
    """An error names what differs."""
    known = model_identity(families.build("llama").config)
    check_identity("file", known, families.build("llama").config)
    for family, message in (
        ("qwen3", "model_type='llama', this model has 'qwen3'"),
        ("llama_mha", "key_value_heads=2"),
    ):
        with pytest.raises(ValueError, match=f"the file was made with {message}"):
            check_identity("file", known, families.build(family).config)


def test_earlier_files_of_query_statistics() -> None:
    """They do not say how many KV heads a model has, or how wide its heads are; everything else is compared."""
    config = families.build("llama").config
    known = model_identity(config)
    earlier = {name: value for name, value in known.items() if name not in ("key_value_heads", "head_dim")}
    check_identity("file", earlier, config)
    check_identity("file", earlier, families.build("llama_mha").config)
    for name in earlier:
        with pytest.raises(ValueError, match=f"the file was made with {name}=None"):
            check_identity("file", {key: value for key, value in earlier.items() if key != name}, config)


def test_weights_tell_models_apart() -> None:
    """Other weights are told apart, but not another dtype."""
    model = families.build("llama")
    samples, attention = sample_weights(model), [layer.self_attn for layer in model.model.layers]
    assert samples == sample_weights(families.build("llama")) and list(samples) == [0, 1]
    for dtype in (torch.bfloat16, torch.float16):
        for index, layer in enumerate(families.build("llama", dtype=dtype).model.layers):
            check_weights("projection", samples[index], layer.self_attn, index)
    with pytest.raises(ValueError, match=r"other weights: those of the keys in layer 1 differ by \d+%; accepted"):
        check_weights("projection", samples[1], attention[0], 1)
    with torch.no_grad():
        attention[1].k_proj.weight *= 1.01
        check_weights("projection", samples[1], attention[1], 1)
        attention[1].k_proj.weight *= 1.5
    with pytest.raises(ValueError, match=r"layer 1 differ by 5[12]%"):
        check_weights("projection", samples[1], attention[1], 1)
    assert sample_weights(torch.nn.Linear(2, 2)) == sample_weights(families.build("llama").to("meta")) == {}
    check_weights("projection", samples[0], torch.nn.Linear(2, 2), 0)
