"""Small configs of every family with multi-head latent attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedConfig

from tests.families import VOCABULARY, WINDOW

#: Keys that a sparse indexer lets a query read: fewer than the tests' sequences have, so that it has to select.
INDEX_TOPK = 16
#: Enough heads that few keys have a score of zero in all of them: ties between such keys are broken by position.
_INDEX_HEADS = 12
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {}


def _family(build_config: Callable[[], PreTrainedConfig]) -> Callable[[], PreTrainedConfig]:
    CONFIGS[build_config.__name__.lstrip("_").replace("__", "-")] = build_config
    return build_config


def _shape(**others: Any) -> dict[str, Any]:
    """Arguments that all configs share: 4 heads with a latent of rank 32 and 8 rotary channels."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,  # tied random embeddings repeat one token for ever
        **others,
    }


def _moe(**others: Any) -> dict[str, Any]:
    """The same with four experts."""
    return _shape(
        **{
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            **others,
        }
    )


def _indexed(**others: Any) -> dict[str, Any]:
    """The same with a sparse indexer in each attention layer."""
    return _moe(**{"index_topk": INDEX_TOPK, "index_head_dim": 16, "index_n_heads": _INDEX_HEADS, **others})


_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}


@_family
def _deepseek_v2() -> PreTrainedConfig:
    # As in DeepSeek-V2-Lite, queries have no low rank.
    return transformers.DeepseekV2Config(**_moe(q_lora_rank=None, v_head_dim=24, first_k_dense_replace=1))


@_family
def _deepseek_v3() -> PreTrainedConfig:
    return transformers.DeepseekV3Config(**_moe(first_k_dense_replace=1, rope_parameters=dict(_YARN)))


@_family
def _deepseek_v3__half_split() -> PreTrainedConfig:
    arguments = _moe(first_k_dense_replace=2, v_head_dim=12, rope_interleave=False)
    return transformers.DeepseekV3Config(**arguments)


@_family
def _deepseek_v32() -> PreTrainedConfig:
    return transformers.DeepseekV32Config(**_indexed(first_k_dense_replace=1, v_head_dim=24))


@_family
def _kimi_linear() -> PreTrainedConfig:
    arguments = _moe(num_hidden_layers=4, q_lora_rank=None, num_local_experts=4)
    del arguments["n_routed_experts"]
    return transformers.KimiLinearConfig(
        **arguments,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_head_dim=16,
        linear_num_heads=4,
    )


@_family
def _glm4_moe_lite() -> PreTrainedConfig:
    return transformers.Glm4MoeLiteConfig(**_moe(qk_nope_head_dim=12, v_head_dim=20))


@_family
def _glm_moe_dsa() -> PreTrainedConfig:
    return transformers.GlmMoeDsaConfig(
        **_indexed(num_hidden_layers=3, first_k_dense_replace=1, indexer_types=["full", "shared", "full"])
    )


@_family
def _glm5_next() -> PreTrainedConfig:
    text = _indexed(
        num_hidden_layers=4,
        qk_rope_head_dim=0,
        layer_types=["linear_attention", "indexed_attention", "indexed_attention", "linear_attention"],
        indexer_types=["full", "full", "shared", "full"],
        mlp_layer_types=["dense", "sparse", "dense", "sparse"],
        linear_head_dim=16,
        linear_num_heads=4,
        index_kpool=4,
        hc_mult=2,
    )
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 32,
        "out_hidden_size": 64,
        "projection_intermediate_size": 32,
    }
    return transformers.Glm5NextConfig(text_config=text, vision_config=vision, **_no_images())


@_family
def _longcat_flash() -> PreTrainedConfig:
    arguments = _shape(ffn_hidden_size=96, num_layers=2)
    for name in ("num_hidden_layers", "intermediate_size"):
        del arguments[name]
    return transformers.LongcatFlashConfig(
        **arguments, head_dim=8, moe_topk=2, n_routed_experts=4, zero_expert_num=2, expert_ffn_hidden_size=32
    )


@_family
def _minicpm3() -> PreTrainedConfig:
    return transformers.MiniCPM3Config(**_shape(scale_emb=1, dim_model_base=64, v_head_dim=24))


@_family
def _mistral4() -> PreTrainedConfig:
    # Queries beyond the original length are scaled up, and half of the rotary channels of a head are rotated.
    rope = {**_YARN, "llama_4_scaling_beta": 0.3, "max_position_embeddings": 1024}
    return transformers.Mistral4Config(**_moe(rope_parameters=rope))


@_family
def _mistral_large4() -> PreTrainedConfig:
    return _mistral_large4_of(no_rope_layers=[1, 0, 1], indexer_types=["full", "shared", "full"])


@_family
def _mistral_large4__sharing() -> PreTrainedConfig:
    # Layers 2 and 3 read the latents of layers 0 and 1; layer 3 selects for itself.
    return _mistral_large4_of(
        no_rope_layers=[1, 0, 1, 0],
        kv_source_layers=[0, 1, 0, 1],
        indexer_types=["full", "full", "shared", "full"],
    )


def _mistral_large4_of(no_rope_layers: list[int], **others: Any) -> PreTrainedConfig:
    text = _indexed(
        num_hidden_layers=len(no_rope_layers),
        no_rope_layers=no_rope_layers,
        first_k_dense_replace=1,
        rope_parameters={**_YARN, "attention_factor": 1.0, "mscale_all_dim": 0.0},
        **others,
    )
    del text["q_lora_rank"]
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    return transformers.MistralLarge4Config(
        text_config=text, vision_config=vision, image_token_index=VOCABULARY - 1, tie_word_embeddings=False
    )


@_family
def _youtu() -> PreTrainedConfig:
    return transformers.YoutuConfig(**_shape(qk_nope_head_dim=20))


@_family
def _axk1() -> PreTrainedConfig:
    return transformers.AXK1Config(**_moe())


@_family
def _axk2() -> PreTrainedConfig:
    return transformers.AXK2Config(**_indexed(gated_norm_rank=8, v_head_dim=24))


@_family
def _bailing_hybrid() -> PreTrainedConfig:
    arguments = _moe(num_hidden_layers=4, num_local_experts=4)
    for name in ("n_routed_experts", "q_lora_rank"):
        del arguments[name]
    return transformers.BailingHybridConfig(
        **arguments,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"] * 2,
        first_k_dense_replace=1,
    )


@_family
def _dots3_note() -> PreTrainedConfig:
    # Sliding layers have heads, ranks and head dimensions of their own.
    sliding = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 40,
        "head_dim": 28,
        "qk_nope_head_dim": 12,
        "v_head_dim": 20,
    }
    return transformers.Dots3NoteTextConfig(
        **_indexed(num_hidden_layers=3, head_dim=24),
        layer_types=["indexed_attention", "sliding_attention", "indexed_attention"],
        sliding_window=WINDOW,
        shared_experts_intermediate_size=32,
        **{f"swa_{name}": value for name, value in sliding.items()},  # type: ignore[arg-type]
    )


@_family
def _dots3_note__full() -> PreTrainedConfig:
    return transformers.Dots3NoteTextConfig(**_indexed(head_dim=24, use_dsa=False, use_sliding_window=False))


@_family
def _hy_v4() -> PreTrainedConfig:
    return transformers.HYV4Config(**_indexed(num_hidden_layers=3), indexer_types=["full", "shared", "full"], hc_mult=2)


@_family
def _hy_v4_vl() -> PreTrainedConfig:
    text = _indexed(
        num_hidden_layers=3,
        indexer_types=["full", "shared", "full"],
        hc_mult=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    )
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 4,
        "max_image_size": 8,
    }
    images = {"image_token_id": VOCABULARY, "video_token_id": VOCABULARY + 1}
    return transformers.HYV4VLConfig(text_config=text, vision_config=vision, **images)


def _no_images() -> dict[str, Any]:
    """Ids outside the vocabulary, so that no random prompt contains an image token."""
    kinds = ("image", "video", "image_start", "image_end", "video_start", "video_end")
    return {f"{kind}_token_id": VOCABULARY + index for index, kind in enumerate(kinds)}
