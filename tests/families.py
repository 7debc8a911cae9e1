"""Tiny random models of many families, built from their configs, for tests of generation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 101
#: Window of sliding layers: smaller than most test prompts, so that tokens leave the window.
WINDOW = 24

_BUILDERS: dict[str, Callable[[], PreTrainedConfig]] = {}

#: Families with linear-attention layers, whose states cannot be rolled back beyond what was recorded.
RECURRENT = ("qwen3_next", "lfm2", "jamba")
#: Families that use a cache as another family in the list does.
_ALIKE = ("llama_mha", "phi", "qwen3", "jamba", "lfm2", "gemma3n", "gemma3_vlm")


def names(*, without: tuple[str, ...] = ()) -> list[Any]:
    """All families except ``without``, for parametrization; those that resemble another one are ``slow``."""
    return [
        pytest.param(name, marks=pytest.mark.slow) if name in _ALIKE else name
        for name in _BUILDERS
        if name not in without
    ]


def every_name() -> list[str]:
    """All families."""
    return list(_BUILDERS)


def build(name: str, attention: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of family ``name``, always with the same weights, whose config nobody else holds.

    Args:
        name: a family, see :func:`names`.
        attention: attention implementation; the family's default if None.
        dtype: dtype of the weights.
    """
    config = _BUILDERS[name]()
    if attention is not None:
        config._attn_implementation = attention
    cls = _model_class(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls._from_config(config) if cls is not AutoModelForCausalLM else cls.from_config(config)
    model.load_state_dict(_weights(name), strict=False)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


@cache
def _weights(name: str) -> dict[str, torch.Tensor]:
    """Weights with which logits differ clearly from token to token, unlike with the usual initialization."""
    config = _BUILDERS[name]()
    cls = _model_class(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = cls._from_config(config) if cls is not AutoModelForCausalLM else cls.from_config(config)
        for path, weight in model.named_parameters():
            if "vision" in path:
                continue
            if weight.dim() >= 2:
                std = 1.0 if "embed_tokens" in path or "embed_in" in path else 1.5 * weight.shape[-1] ** -0.5
                torch.nn.init.normal_(weight, std=std)
            elif path.endswith("k_proj.bias"):
                torch.nn.init.normal_(weight, std=5.0)
            elif path.endswith(("q_proj.bias", "v_proj.bias", "query_key_value.bias", "sinks")):
                torch.nn.init.normal_(weight, std=0.5)
    return model.state_dict()


def _model_class(config: PreTrainedConfig) -> Any:
    composed = {"llava": "LlavaForConditionalGeneration", "gemma3": "Gemma3ForConditionalGeneration"}
    return getattr(transformers, composed.get(config.model_type, "AutoModelForCausalLM"))


def _family(build_config: Callable[[], PreTrainedConfig]) -> Callable[[], PreTrainedConfig]:
    _BUILDERS[build_config.__name__.lstrip("_")] = build_config
    return build_config


def _shape(**others: Any) -> dict[str, Any]:
    """Arguments that most configs share: grouped queries (4 query heads, 2 KV heads)."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
        "tie_word_embeddings": False,  # tied random embeddings repeat one token for ever
        **others,
    }


@_family
def _llama() -> PreTrainedConfig:
    return transformers.LlamaConfig(**_shape(head_dim=16))


@_family
def _llama_mha() -> PreTrainedConfig:
    return transformers.LlamaConfig(**_shape(num_key_value_heads=4, head_dim=24))


@_family
def _qwen2() -> PreTrainedConfig:
    return transformers.Qwen2Config(**_shape())


@_family
def _qwen3() -> PreTrainedConfig:
    return transformers.Qwen3Config(**_shape(head_dim=32))


@_family
def _gemma2() -> PreTrainedConfig:
    config = transformers.Gemma2Config(**_shape(head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16))
    config._attn_implementation = "eager"  # sdpa has no soft-capping
    return config


@_family
def _gemma3() -> PreTrainedConfig:
    return transformers.Gemma3TextConfig(**_gemma3_shape())


@_family
def _gpt_neox() -> PreTrainedConfig:
    arguments = _shape()
    del arguments["num_key_value_heads"]
    return transformers.GPTNeoXConfig(**arguments)


@_family
def _phi() -> PreTrainedConfig:
    return transformers.PhiConfig(**_shape())


@_family
def _mixtral() -> PreTrainedConfig:
    return transformers.MixtralConfig(**_shape(head_dim=16, num_local_experts=4))


@_family
def _mistral() -> PreTrainedConfig:
    return transformers.MistralConfig(**_shape(head_dim=16, sliding_window=WINDOW))


@_family
def _gpt_oss() -> PreTrainedConfig:
    config = transformers.GptOssConfig(
        **_shape(head_dim=16, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2)
    )
    config._attn_implementation = "eager"  # the only one with learned sinks on a CPU
    return config


@_family
def _qwen3_next() -> PreTrainedConfig:
    return transformers.Qwen3NextConfig(
        **_shape(head_dim=16, num_hidden_layers=3),
        layer_types=["linear_attention", "full_attention", "full_attention"],
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )


@_family
def _lfm2() -> PreTrainedConfig:
    return transformers.Lfm2Config(
        **_shape(num_hidden_layers=3), layer_types=["conv", "full_attention", "full_attention"]
    )


@_family
def _jamba() -> PreTrainedConfig:
    return transformers.JambaConfig(
        **_shape(num_hidden_layers=3),
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=8,
        mamba_dt_rank=8,
    )


@_family
def _deepseek_v3() -> PreTrainedConfig:
    return transformers.DeepseekV3Config(
        **_shape(num_key_value_heads=4),
        moe_intermediate_size=32,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )


@_family
def _gemma3n() -> PreTrainedConfig:
    return transformers.Gemma3nTextConfig(
        **_shape(head_dim=16, num_hidden_layers=4, sliding_window=WINDOW),
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
    )


@_family
def _gemma4() -> PreTrainedConfig:
    return transformers.Gemma4TextConfig(
        **_shape(head_dim=16, num_hidden_layers=4, sliding_window=WINDOW),
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        global_head_dim=32,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
    )


@_family
def _llava() -> PreTrainedConfig:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION, projection_dim=16),
        text_config=transformers.LlamaConfig(**_shape(head_dim=16)),
        image_token_index=VOCABULARY - 1,
        image_seq_length=4,
    )


@_family
def _gemma3_vlm() -> PreTrainedConfig:
    return transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**_VISION),
        text_config=transformers.Gemma3TextConfig(**_gemma3_shape()),
        mm_tokens_per_image=4,
        tie_word_embeddings=False,
        image_token_index=VOCABULARY - 1,
    )


_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def _gemma3_shape() -> dict[str, Any]:
    return _shape(
        head_dim=32,
        num_hidden_layers=3,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=32,
    )
