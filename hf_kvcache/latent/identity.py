"""Telling whether a model is the one that was calibrated."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from hf_kvcache.calibrating import fingerprint

#: What models call the projection of keys, alone or with those of queries and values.
_NAMES = ("k_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv")


def identity(config: Any) -> dict[str, Any]:
    """What a config says of the keys and values that a model caches."""
    text: Any = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    return {
        **fingerprint(config),
        "key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
    }


def weights_digest(model: Any) -> str:
    """Hex digest of the first and the last attention weight of ``model``, whatever the dtype it was loaded in.

    Empty where they are not at hand: quantized, or offloaded to a disk.
    """
    found = [
        weight
        for name, weight in model.named_parameters()
        if weight.dim() == 2 and name.rpartition(".")[0].endswith(_NAMES)
    ]
    digest = hashlib.sha256()
    for weight in found[:1] + found[-1:]:
        if weight.is_meta or not weight.is_floating_point():
            return ""
        digest.update(weight.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest() if found else ""
