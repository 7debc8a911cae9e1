"""Tiny random models that use a cache in unusual ways: attend by themselves, run layers twice, or drop the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tests.families import VOCABULARY, WINDOW

_SHORT = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
_LONG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    # Names of their own for heads and widths.
    "gpt2": lambda: transformers.GPT2Config(**_SHORT),
    "gpt_bigcode": lambda: transformers.GPTBigCodeConfig(**_SHORT),
    "gptj": lambda: transformers.GPTJConfig(**_SHORT, rotary_dim=8),
    "codegen": lambda: transformers.CodeGenConfig(**_SHORT, rotary_dim=8),
    "ctrl": lambda: transformers.CTRLConfig(**_SHORT, dff=96),
    "dbrx": lambda: transformers.DbrxConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        n_layers=2,
        n_heads=4,
        max_seq_len=512,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        ffn_config={"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "jetmoe": lambda: transformers.JetMoeConfig(**_LONG, num_key_value_heads=4, num_local_experts=4),
    # Attention of their own.
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4),
    "mpt": lambda: transformers.MptConfig(vocab_size=VOCABULARY, d_model=64, n_layers=2, n_heads=4, use_cache=True),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=16,
        max_position_embeddings=512,
    ),
    "xglm": lambda: transformers.XGLMConfig(
        vocab_size=VOCABULARY, d_model=64, num_layers=2, attention_heads=4, ffn_dim=96
    ),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4
    ),
    "diffllama": lambda: transformers.DiffLlamaConfig(**_LONG, num_key_value_heads=2),
    "doge": lambda: transformers.DogeConfig(**_LONG, num_key_value_heads=2, keep_window_size=16),
    "modernbert_decoder": lambda: transformers.ModernBertDecoderConfig(
        **_LONG, layer_types=["full_attention"] * 2, pad_token_id=0
    ),
    # A rotary embedding that changes at 64 tokens.
    "phi3": lambda: transformers.Phi3Config(
        **_LONG,
        num_key_value_heads=2,
        pad_token_id=0,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 64,
        },
    ),
    # The model class of another family.
    "sarvam_mla": lambda: transformers.CONFIG_MAPPING["sarvam_mla"](
        **_LONG,
        num_key_value_heads=4,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
    # The layers in the middle are gone through twice.
    "dory": lambda: transformers.DoryConfig(
        **{**_LONG, "num_hidden_layers": 4},
        num_key_value_heads=2,
        n_input_layers=1,
        n_recurrent_layers=2,
        n_output_layers=1,
        n_recurrent_loops=2,
        sliding_window=WINDOW,
    ),
}

OUTSIDE = ("bloom", "mpt", "gpt_neo", "xglm", "falcon")


def build(name: str, attention: str | None = None, **changes: Any) -> PreTrainedModel:
    """A model of ``name`` whose logits differ clearly from token to token."""
    config = CONFIGS[name]()
    for argument, value in changes.items():
        setattr(config, argument, value)
    if attention is not None:
        config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
        for path, weight in model.named_parameters():
            if weight.dim() >= 2:
                std = 1.0 if "embed" in path or "wte" in path else 1.5 * weight.shape[-1] ** -0.5
                torch.nn.init.normal_(weight, std=std)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def known(name: str) -> bool:
    """Whether the installed transformers has the family at all."""
    return name not in ("dory", "sarvam_mla") or name in transformers.CONFIG_MAPPING
