"""A tiny random DeepSeek V4, whose windows of compression are short, so that few tokens fill many of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_kvcache.integration.versions import with_cache

VOCABULARY = 61
LAYERS = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
RATES = {"compressed_sparse_attention": 3, "heavily_compressed_attention": 8}
WINDOW, CHOSEN = 12, 5


@cache
def build(dtype: torch.dtype = torch.float32, **others: Any) -> PreTrainedModel:
    """The model."""
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": len(LAYERS),
        "num_attention_heads": 3,
        "head_dim": 32,
        "partial_rotary_factor": 0.25,
        "q_lora_rank": 16,
        "num_experts_per_tok": 1,
        "n_routed_experts": 2,
        "layer_types": list(LAYERS),
        "mlp_layer_types": ["moe"] * len(LAYERS),
        "compress_rates": dict(RATES),
        "sliding_window": WINDOW,
        "o_groups": 1,
        "o_lora_rank": 16,
        # With few heads a score is often 0 for all of them, and equal scores are chosen from in any order.
        "index_n_heads": 8,
        "index_head_dim": 16,
        "index_topk": CHOSEN,
        "hc_mult": 1,
        "hc_sinkhorn_iters": 1,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = modeling.DeepseekV4Config(**shape | others)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = modeling.DeepseekV4ForCausalLM._from_config(config)
        for path, weight in model.named_parameters():
            if weight.dim() >= 2:
                torch.nn.init.normal_(weight, std=1.0 if "embed_tokens" in path else 1.5 * weight.shape[-1] ** -0.5)
            elif path.endswith("sinks"):
                torch.nn.init.normal_(weight, std=0.5)
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids ``[batch, length]``, none of them the padding."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model: PreTrainedModel, tokens: torch.Tensor, held: Any, **others: Any) -> torch.Tensor:
    """The logits of ``tokens`` behind those in the cache ``held``."""
    return model(tokens, **with_cache(model, held), **others).logits


def steps(model: PreTrainedModel, tokens: torch.Tensor, held: Any) -> torch.Tensor:
    """The logits of ``tokens``, read one by one."""
    return torch.cat([read(model, tokens[:, i : i + 1], held) for i in range(tokens.shape[1])], 1)
