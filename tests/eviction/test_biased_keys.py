"""Keys with large biases, as those of Qwen2.5's first and last layers: few bits must not be spent on them."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from hf_kvcache import HeavyHitterCache, KVCache, SlidingWindowCache
from tests.running import forward, full_cache

HEAD_DIM, PROMPT = 64, 300


def biased(norm: float) -> PreTrainedModel:
    """A model whose first and last layers have a key bias of length ``norm`` in slow and in middling channels."""
    config = transformers.Qwen2Config(
        vocab_size=101,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM._from_config(config)
        for path, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=1.0 if "embed" in path else weight.shape[-1] ** -0.5)
        for layer in (0, 2):
            bias = model.model.layers[layer].self_attn.k_proj.bias.view(-1, HEAD_DIM)
            for head in bias:
                head[[20, 30, 52, 61]] = norm * torch.nn.functional.normalize(torch.randn(4), dim=0)
    return model.eval()


def divergence(model: PreTrainedModel, cache: KVCache) -> float:
    """Mean KL of the predictions behind a prompt from those of an uncompressed cache."""
    ids = torch.randint(0, 101, (1, PROMPT + 40), generator=torch.Generator().manual_seed(1))
    logits = []
    for held in (full_cache(model), cache):
        forward(model, ids[:, :PROMPT], held)
        logits.append(forward(model, ids[:, PROMPT:], held).log_softmax(-1))
    return float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("norm", [22.0, 300.0])
def test_the_default_of_few_bits_stands_biases(norm: float, bits: int) -> None:
    model = biased(norm)
    plain = divergence(model, HeavyHitterCache(model.config, 1000, codec="turboquant", bits=bits))
    ours = divergence(model, HeavyHitterCache(model.config, 1000, bits=bits))
    assert ours < (0.6 if norm > 100 else 1.0) * plain
    assert divergence(model, SlidingWindowCache(model.config, 1000, bits=bits)) < 1.1 * ours + 1e-3
