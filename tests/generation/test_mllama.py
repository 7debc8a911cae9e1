"""Llama 3.2 Vision. Some of its layers attend to an image, and read the states of the image from the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration, PreTrainedModel
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from hf_kvcache import HeavyHitterCache, QuantizedKVCache
from tests.families import VOCABULARY
from tests.running import assert_same, full_cache, generate, prompt, small_cache

IMAGE = VOCABULARY - 1
#: Number of states of an image. It equals the number of text tokens, so that a confusion of the two would show.
STATES = 10


@pytest.fixture(scope="module")
def mllama() -> PreTrainedModel:
    text = MllamaTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        cross_attention_layers=[1, 3],
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    vision = MllamaVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        vision_output_dim=64,
        intermediate_layers_indices=[0],
        max_num_tiles=2,
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(
        MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    )
    for name, weight in model.named_parameters():
        if "gate" in name:
            torch.nn.init.constant_(weight, 0.8)
        elif weight.dim() >= 2 and "vision" not in name:
            torch.nn.init.normal_(weight, std=1.0 if "embed" in name else 1.5 * weight.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def with_image(tokens: int) -> dict[str, Any]:
    """A prompt that shows one image of two tiles, of which one is padding."""
    ids = prompt(tokens)
    ids[:, 1] = IMAGE
    draw = torch.Generator().manual_seed(0)
    seen = torch.ones(1, tokens, 1, 2, dtype=torch.long)
    seen[..., 1] = 0
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 1, 2, 3, 16, 16, generator=draw),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 0]]]),
        "cross_attention_mask": seen,
    }


@pytest.mark.parametrize("tokens", [40, STATES])
@pytest.mark.parametrize("image", [True, False])
def test_equals_dynamic_cache(mllama: PreTrainedModel, image: bool, tokens: int) -> None:
    """Logits equal those of DynamicCache with and without an image, whose states are as many as the text tokens."""
    inputs = with_image(tokens) if image else prompt(tokens)
    theirs = generate(mllama, inputs, full_cache(mllama))
    ours = generate(mllama, inputs, small_cache(mllama))
    assert [layer.get_seq_length() for layer in ours.cache.layers][1] == (STATES if image else 0)
    assert_same(ours, theirs)


def test_quantized_and_cropped(mllama: PreTrainedModel) -> None:
    """A crop removes tokens of the text, and no states of the image."""
    cache = QuantizedKVCache(mllama.config, bits=8, page_size=8, tail_length=8)
    generate(mllama, with_image(40), cache)
    cache.crop(-3)
    assert [layer.get_seq_length() for layer in cache.layers] == [56, STATES, 56, STATES]
    cache.integrity()


def test_eviction_leaves_the_image_alone(mllama: PreTrainedModel) -> None:
    """The budget counts tokens of the text only, and states of the image are never evicted."""
    cache = HeavyHitterCache(mllama.config, 20, "snapkv", tail_length=4, page_size=8, interval=8)
    out = generate(mllama, with_image(60), cache)
    assert out.logits.isfinite().all()
    assert cache.layers[1].keys.shape[2] == STATES
