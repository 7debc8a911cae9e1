"""Un-rotated keys are what the key projection gave, whatever the family's layout of rotary pairs; or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from hf_kvcache.integration.rope import LayerRope, rope_of
from tests import families
from tests.running import as_cache
from tests.tolerances import assert_near

#: Shorter than the sliding windows, so that a DynamicCache still holds every key.
TOKENS = 20
#: Absolute, of keys of order 1: positions times frequencies are float32 products.
ROUNDING = 1e-5

SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "glm": lambda: transformers.GlmConfig(**SHAPE, head_dim=16),
    "glm4": lambda: transformers.Glm4Config(**SHAPE, head_dim=16),
    "cohere": lambda: transformers.CohereConfig(**SHAPE),
    "cohere2": lambda: transformers.Cohere2Config(
        **SHAPE, layer_types=["sliding_attention", "full_attention"], sliding_window=64
    ),
    "stablelm": lambda: transformers.StableLmConfig(**SHAPE, qk_layernorm=False),
    "smollm3": lambda: transformers.SmolLM3Config(**SHAPE, no_rope_layers=[1, 0]),
    "olmo2": lambda: transformers.Olmo2Config(**SHAPE),
    "phi3": lambda: transformers.Phi3Config(**SHAPE),
    "llama_yarn": lambda: transformers.LlamaConfig(**SHAPE, rope_parameters=YARN),
    "llama3": lambda: transformers.LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
}
REFUSED: dict[str, Callable[[], PreTrainedConfig]] = {
    "has no rotary embedding": lambda: transformers.GPT2Config(
        vocab_size=101, n_embd=64, n_layer=1, n_head=4, n_positions=64
    ),
    "rope_type='dynamic'": lambda: transformers.LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "rope_type='longrope'": lambda: transformers.LlamaConfig(
        **SHAPE,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 64,
        },
    ),
    "not a rotation": lambda: transformers.HunYuanDenseV1Config(**SHAPE, head_dim=16),
    "position_embedding_type='nope'": lambda: transformers.GraniteMoeHybridConfig(
        **SHAPE, layer_types=["attention"] * 2, num_local_experts=0, position_embedding_type="nope"
    ),
}


@pytest.mark.parametrize(
    "name",
    ["llama", "qwen3", "gemma3", "phi", "gpt_neox", "gpt_oss", "qwen3_next", "lfm2", "gemma2", "gemma4", *MODELS],
)
def test_unrotated_keys_are_the_projected_ones(name: str) -> None:
    model = build(name)
    checked = 0
    for layer, module, projected in cached_layers(model):
        rope, positions = rope_of(module), torch.arange(TOKENS)
        torch.testing.assert_close(rope.unrotate(layer, positions), projected, rtol=0, atol=ROUNDING)
        torch.testing.assert_close(rope.rotate(projected, positions), layer, rtol=0, atol=ROUNDING)
        check_pairs(rope, projected)
        checked += 1
    assert checked >= 1


@pytest.mark.parametrize("name", ["gemma3n", "llava", "gemma3_vlm", "mixtral", "mistral", "qwen2", "llama_mha"])
@pytest.mark.slow
def test_more_families(name: str) -> None:
    test_unrotated_keys_are_the_projected_ones(name)


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_undone_raises(reason: str) -> None:
    model = AutoModelForCausalLM.from_config(REFUSED[reason]())
    with pytest.raises(ValueError, match=reason):
        rope_of(attention_modules(model)[0])


@pytest.mark.parametrize("name", ["jamba", "deepseek_v3"])
def test_families_without_rotated_keys_raise(name: str) -> None:
    with pytest.raises(ValueError, match=r"no rotary embedding|latent attention"):
        rope_of(attention_modules(families.build(name))[0])


def test_layer_types_have_frequencies_of_their_own() -> None:
    sliding, full, _ = (rope_of(module) for module in attention_modules(families.build("gemma3")))
    assert not torch.allclose(sliding.frequencies, full.frequencies)


def test_layers_without_positions_leave_keys_alone() -> None:
    module = attention_modules(build("cohere2"))[1]
    x = torch.randn(3, 5, 16)
    assert torch.equal(rope_of(module).unrotate(x, torch.arange(5)), x)
    assert not rope_of(module).frequencies.any()


def test_yarn_scales_what_it_rotates() -> None:
    rope = rope_of(attention_modules(build("llama_yarn"))[0])
    x = torch.randn(2, 7, 16)
    assert rope.scale > 1.1
    assert_near(rope.rotate(x, torch.zeros(7, dtype=torch.long)), x * rope.scale)


def test_a_layer_in_bfloat16_is_understood() -> None:
    exact, rounded = rope_of(attention_modules(build("glm"))[0]), rope_of(attention_modules(build("glm").bfloat16())[0])
    assert torch.equal(exact.first, rounded.first) and torch.equal(exact.second, rounded.second)


def test_each_head_may_have_positions_of_its_own() -> None:
    rope = rope_of(attention_modules(build("glm"))[0])
    x, positions = torch.randn(2, 3, 5, 16), torch.randint(0, 5000, (2, 3, 5))
    together = rope.rotate(x, positions)
    for row in range(2):
        for head in range(3):
            assert torch.equal(together[row, head], rope.rotate(x[row, head], positions[row, head]))
    assert_near(rope.unrotate(together, positions), x)


def check_pairs(rope: LayerRope, x: torch.Tensor) -> None:
    """Rotating multiplies a pair by ``exp(1j * position * frequency)``, and by the scale where it rotates."""
    position = 37
    turned = rope.pairs(rope.rotate(x, torch.full((x.shape[-2],), position)))
    factor = torch.exp(1j * position * rope.frequencies)
    factor = torch.where(rope.frequencies > 0, factor * rope.scale, factor)
    torch.testing.assert_close(turned, rope.pairs(x) * factor, rtol=0, atol=5e-5)
    length = torch.cat([rope.first, rope.second]).sort().values
    assert torch.equal(length, torch.arange(x.shape[-1]))


def build(name: str) -> PreTrainedModel:
    if name not in MODELS:
        return families.build(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(MODELS[name]())
        for path, weight in model.named_parameters():
            if weight.dim() >= 2:
                torch.nn.init.normal_(weight, std=1.0 if "embed" in path else 1.5 * weight.shape[-1] ** -0.5)
            elif "norm" in path:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model.eval()


def attention_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    decoder = model.get_decoder()
    return [
        module
        for module in decoder.modules()
        if type(module).__name__.endswith("Attention") and getattr(module, "layer_idx", None) is not None
    ]


def cached_layers(model: PreTrainedModel) -> list[tuple[torch.Tensor, torch.nn.Module, torch.Tensor]]:
    """Keys in a DynamicCache, the layer's attention module, and the keys as they were before rotating."""
    seen: dict[int, torch.Tensor] = {}
    modules = [m for m in attention_modules(model) if not getattr(m, "is_kv_shared_layer", False)]
    hooks = [source(m).register_forward_hook(keep(seen, m)) for m in modules]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.randint(3, 100, (2, TOKENS), generator=torch.Generator().manual_seed(0)), **as_cache(cache))
    for hook in hooks:
        hook.remove()
    layers: list[Any] = cache.layers
    return [(layers[index].keys, m, seen[index]) for m in modules for index in [int(m.layer_idx)]]  # type: ignore[arg-type]


def source(module: Any) -> torch.nn.Module:
    """The part of an attention module that computes the keys that are then rotated."""
    for name in ("k_norm", "k_layernorm", "k_proj", "query_key_value", "qkv_proj"):
        if isinstance(getattr(module, name, None), torch.nn.Module):
            return getattr(module, name)
    raise AssertionError(f"{type(module).__name__} computes its keys elsewhere")


def keep(seen: dict[int, torch.Tensor], module: Any) -> Callable[..., None]:
    def hook(part: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        dim = module.head_dim if hasattr(module, "head_dim") else module.head_size
        if part is getattr(module, "query_key_value", None):
            output = output.unflatten(-1, (-1, 3, dim))[..., 1, :]
        elif part is getattr(module, "qkv_proj", None):
            heads = module.config.num_key_value_heads
            output = output.unflatten(-1, (-1, dim))[..., -2 * heads : -heads, :]
        elif output.shape[-1] != dim:
            output = output.unflatten(-1, (-1, dim))
        seen[module.layer_idx] = output.transpose(1, 2) if output.shape[1] == TOKENS else output

    return hook
