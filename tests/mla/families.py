"""Tiny random models of every family with multi-head latent attention, built from their configs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from tests.mla.configs import CONFIGS

#: Families with layers of linear attention, whose recurrent states cannot be cropped.
RECURRENT = ("kimi_linear", "glm5_next", "bailing_hybrid")
#: Families whose models keep positions from one call to the next, so that tests can only call ``generate``.
STATEFUL = ("hy_v4_vl",)
#: Operations that fail with ``DynamicCache`` itself: by operation and family, a part of the error message.
BROKEN: dict[str, dict[str, str]] = {
    "draft": dict.fromkeys(RECURRENT, "assisted generation is not supported with stateful models"),
    "crop": dict.fromkeys(RECURRENT, "the current layer does not track past states")
    | {"dots3_note": "the sliding window size was already reached"},
    "select": dict.fromkeys(RECURRENT, "has no attribute 'batch_select_indices'"),
    "repeat": dict.fromkeys(RECURRENT, "has no attribute 'batch_repeat_interleave'"),
}


def names(*, without: Iterable[str] = ()) -> list[str]:
    """The installed families and their variants (``family-variant``), except those in ``without``."""
    skipped = (*without, *STATEFUL)
    return [name for name in CONFIGS if name not in skipped and family(name) in installed() and _is_known(name)]


@cache
def _is_known(name: str) -> bool:
    """Whether layers with an indexer cache latents; before transformers 5.19 they cached keys, under another name."""
    try:
        return "deepseek_sparse_attention" not in (layer_types(name) or [])
    except StrictDataclassError:  # the name of today is none then
        return False


def written() -> set[str]:
    """The families that have a config here."""
    return {family(name) for name in CONFIGS}


def family(name: str) -> str:
    """The family, a folder of ``transformers.models``, that ``name`` is a variant of."""
    return name.split("-")[0]


def layer_types(name: str) -> list[str] | None:
    """The types of layers in the config of ``name``; None if all layers attend to all tokens."""
    return getattr(CONFIGS[name]().get_text_config(decoder=True), "layer_types", None)


@cache
def installed() -> set[str]:
    """The families of the installed transformers that have a class with the method ``expand_kv``."""
    sources = Path(transformers.models.__path__[0]).glob("*/modeling_*.py")
    return {source.parent.name for source in sources if "def expand_kv(" in source.read_text(encoding="utf-8")}


def build(name: str, attention: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model ``name``, always with the same weights, whose config nobody else holds.

    Args:
        name: a family or variant, see :func:`names`.
        attention: attention implementation; the family's default if None.
        dtype: dtype of the weights.
    """
    config = CONFIGS[name]()
    if attention is not None:
        config._attn_implementation = attention
    model: Any = _initialized(config)
    model.load_state_dict(_weights(name))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


@cache
def shared(name: str) -> PreTrainedModel:
    """The same model in float32, built once, for tests that do not change it."""
    return build(name)


def _initialized(config: PreTrainedConfig) -> PreTrainedModel:
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    cls = AutoModelForCausalLM if known else AutoModelForImageTextToText  # some exist with a vision tower only
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls.from_config(config)


@cache
def _weights(name: str) -> dict[str, torch.Tensor]:
    """Weights with which logits differ clearly from token to token, and norms do not multiply by one."""
    model = _initialized(CONFIGS[name]())
    generator = torch.Generator().manual_seed(_SEEDS.get(name, 1))
    for path, weight in model.named_parameters():
        if "norm" in path and path.endswith("weight"):
            torch.nn.init.uniform_(weight, 0.5, 1.5, generator=generator)
        elif path.endswith("sinks"):
            torch.nn.init.normal_(weight, generator=generator)
        elif weight.dim() >= 2 and not any(part in path for part in _OWN_INITIALIZATION):
            std = 1.0 if "embed_tokens" in path else 1.5 * weight.shape[-1] ** -0.5
            torch.nn.init.normal_(weight, std=std, generator=generator)
    return model.state_dict()


#: Where the usual seed makes two tokens about as likely, so that rounding would choose.
_SEEDS = {"mistral_large4-sharing": 2}
#: Parameters whose scale means something: what they map to is squashed or iterated.
_OWN_INITIALIZATION = ("hc", "conv1d", "vision")
