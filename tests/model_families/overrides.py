"""Sizes that generic shrinking does not get right, by the name of the config's class."""

from __future__ import annotations

from typing import Any

from tests.model_families.sizes import HEAD_DIM, HEADS, HIDDEN, WINDOW

_PERIODIC = {"num_hidden_layers": 3, "attn_layer_period": 2, "attn_layer_offset": 1}
_RECURRENT_THEN_FULL = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "full_attention"]}
_CONV_THEN_FULL = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "full_attention"]}
_SLIDING_AND_FULL = ["sliding_attention", "full_attention"] * 2
_SHARING = {
    "num_hidden_layers": 4,
    "layer_types": _SLIDING_AND_FULL,
    "num_kv_shared_layers": 2,
}
_SWA = {
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 40,
    "swa_head_dim": 28,
    "swa_qk_nope_head_dim": 12,
    "swa_v_head_dim": 20,
}
_DENSE_THEN_SPARSE = ["dense", "sparse", "dense", "sparse"]
_LINEAR_THEN_FULL = ["linear_attention", "full_attention"] * 2

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "max_position_embeddings": 1024,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
    "llama_4_scaling_beta": 0.3,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    # sizes whose default is None, with which the model does not run
    "HunYuanDenseV1Config": {"head_dim": HEAD_DIM},
    "HunYuanMoEV1Config": {"head_dim": HEAD_DIM},
    "HunYuanVLTextConfig": {"head_dim": HEAD_DIM},
    "MinistralConfig": {"head_dim": HEAD_DIM},
    "NemotronConfig": {"head_dim": HEAD_DIM, "num_key_value_heads": 2},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
    },
    "Step3p7TextConfig": {"sliding_window": WINDOW},
    # kinds of layers
    "BambaConfig": {"num_hidden_layers": 3, "attn_layer_indices": [1, 2]},
    "JambaConfig": dict(_PERIODIC, num_experts=2, num_experts_per_tok=1),
    "GraniteMoeHybridConfig": dict(_RECURRENT_THEN_FULL),
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "Lfm2Config": dict(_CONV_THEN_FULL),
    "Lfm2MoeConfig": dict(_CONV_THEN_FULL),
    "ZambaConfig": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "attention_head_dim": 2 * HIDDEN // HEADS,
        "attention_hidden_size": 2 * HIDDEN,
        "num_key_value_heads": HEADS,
    },
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "DoryConfig": {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "layer_types": _SLIDING_AND_FULL,
    },
    "Gemma3nTextConfig": {**_SHARING, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": 96},
    "Gemma4TextConfig": {**_SHARING, "global_head_dim": 32},
    "Gemma4UnifiedTextConfig": {**_SHARING, "global_head_dim": 32},
    "Dots3NoteTextConfig": {
        "num_hidden_layers": 3,
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
        "head_dim": 24,
        **_SWA,
    },
    "BailingHybridConfig": {
        "num_hidden_layers": 4,
        "layer_types": _LINEAR_THEN_FULL,
        "mlp_layer_types": _DENSE_THEN_SPARSE,
        "head_dim": 16,
        "q_lora_rank": None,
    },
    "KimiLinearConfig": {
        "num_hidden_layers": 4,
        "layer_types": _LINEAR_THEN_FULL,
        "mlp_layer_types": _DENSE_THEN_SPARSE,
        "q_lora_rank": None,
    },
    # sizes that depend on each other
    "DbrxAttentionConfig": {"rope_theta": 10000.0},
    "DbrxConfig": {"attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000.0}},
    "Dots3NoteVisionConfig": {"adapter_in_dim": HIDDEN},
    "Dots3NoteAudioConfig": {"adapter_input_size": HIDDEN},
    "Mistral4Config": {"rope_parameters": _YARN},
    "MuseSparkAudioConfig": {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "num_hidden_layers": 4},
    "Granite4VisionConfig": {"deepstack_layer_map": [[1, 0]], "downsample_rate": "1/2"},
    "JanusVQVAEConfig": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_embeddings": 64},
    "MusicgenDecoderConfig": {"num_codebooks": 1},
    "MusicgenMelodyDecoderConfig": {"num_codebooks": 1},
    "Ernie4_5_VLMoeTextConfig": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
    },
    "CohereCompassTextConfig": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "Glm5NextTextConfig": {"qk_rope_head_dim": 0},
    "LongcatFlashConfig": {"head_dim": 8},
    "DeepseekV2Config": {"q_lora_rank": None, "num_experts_per_tok": 2},
    "FalconH1Config": {"mamba_d_ssm": 2 * HIDDEN},
    "Mamba2Config": {"num_heads": 8},
    "xLSTMConfig": {"qk_dim_factor": 1.0},
    "ReformerConfig": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 32], "max_position_embeddings": 512},
    "ZayaConfig": {"num_experts_per_tok": 1, "router_hidden_size": 32},
    "RoCBertConfig": {
        "pronunciation_vocab_size": 8,
        "shape_vocab_size": 8,
        "enable_pronunciation": False,
        "enable_shape": False,
    },
    "XmodConfig": {"default_language": "en_XX"},
    "Gemma3Config": {"mm_tokens_per_image": 4},
    "MllamaVisionConfig": {"max_num_tiles": 4},
    "Molmo2AdapterConfig": {"vision_feature_layer": [1, 0]},
}
