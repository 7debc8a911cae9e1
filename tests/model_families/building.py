"""Tiny random models whose logits differ clearly from token to token."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tests.model_families.catalog import Family
from tests.model_families.shrinking import tiny_config


class NotBuilt(Exception):
    """There is no tiny model of this family, because something that it needs is missing or it cannot be made small."""


def build(family: Family, seed: int = 1) -> PreTrainedModel:
    """The model of a family, in float32 and evaluation mode, always with the same weights."""
    if not family.model_class().can_generate():
        raise NotBuilt("it does not generate text")
    try:
        config = _config_for(family)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = family.model_class()._from_config(config)
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _sharpen(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    for name in ("forced_eos_token_id", "forced_bos_token_id", "suppress_tokens", "begin_suppress_tokens"):
        setattr(model.generation_config, name, None)
    return model.float().eval()


def _config_for(family: Family) -> PreTrainedConfig:
    """The config for the family's class: the text part of a composed config, if the class is a text model."""
    config = tiny_config(family.model_type)
    wanted: Any = family.model_class().config_class
    if not isinstance(config, wanted):
        parts = [getattr(config, name, None) for name in config.sub_configs]
        config = next((part for part in parts if isinstance(part, wanted)), config)
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "is_decoder"):
            part.is_decoder = True
        if getattr(part, "attn_logit_softcapping", None):
            part._attn_implementation = "eager"  # in older releases sdpa ignores it
    return config


def _sharpen(model: PreTrainedModel) -> None:
    """Draw larger weights: with the usual initialization logits hardly differ."""
    for path, module in model.named_modules():
        if "vision" in path or "audio" in path:
            continue
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(weight, std=1.0)
        elif isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            fan_in = weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1]
            torch.nn.init.normal_(weight, std=1.5 * fan_in**-0.5)
            if path.endswith(("q_proj", "k_proj", "v_proj")) and isinstance(module.bias, torch.Tensor):
                torch.nn.init.normal_(module.bias, std=0.5)
