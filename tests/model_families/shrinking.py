"""Tiny configs of any model family: every known size gets a small value, in sub-configs too."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from tests.model_families.overrides import OVERRIDES
from tests.model_families.sizes import HEAD_DIM, LAYERS, SIZES, VOCABULARY

_ORDINARY_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A config of family ``model_type`` with two layers, or more if it has more kinds of layers."""
    return shrunk(CONFIG_MAPPING[model_type])


def shrunk(cls: type[PreTrainedConfig], start: PreTrainedConfig | None = None) -> PreTrainedConfig:
    """A config of ``cls`` whose known sizes are small; other fields have the values of ``start``."""
    default = cls() if start is None else start
    values = {**_sizes(default), **_layers(default), **_parts(default), **_tokens(default)}
    known = {field.name for field in dataclasses.fields(cls)}
    values = {name: value for name, value in values.items() if name in known}
    if values.get("kv_lora_rank"):
        values["num_key_value_heads"] = values["num_attention_heads"]
    if "tie_word_embeddings" in known:
        values["tie_word_embeddings"] = False  # with tied random embeddings a model repeats one token
    return cls(**{**values, **OVERRIDES.get(cls.__name__, {})})


def _sizes(default: PreTrainedConfig) -> dict[str, Any]:
    values: dict[str, Any] = {}
    width = SIZES["qk_rope_head_dim"] if hasattr(default, "qk_rope_head_dim") else HEAD_DIM
    for field in dataclasses.fields(default):
        name, value = field.name, _value(default, field.name)
        if isinstance(value, int) and not isinstance(value, bool) and name in SIZES:
            values[name] = SIZES[name]
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            values[name] = _rope(value, width if _sections(type(default)) else None)
    return values


def _sections(cls: type[PreTrainedConfig]) -> bool:
    """Whether the model of this config splits rotary channels by time, height and width."""
    file = Path(inspect.getfile(cls).replace("configuration_", "modeling_"))
    return hasattr(cls, "vocab_size") and file.exists() and "mrope_section" in file.read_text()


def _rope(parameters: dict[str, Any], width: int | None) -> dict[str, Any]:
    """Rotary parameters for heads of ``width`` channels; ``width`` is None if the channels have no sections."""
    small = {name: _rope(value, width) if isinstance(value, dict) else value for name, value in parameters.items()}
    if width is not None and "rope_type" in parameters:
        half = int(width * (parameters.get("partial_rotary_factor") or 1.0)) // 2
        small["mrope_section"] = [half - half // 4 * 2, half // 4, half // 4]
    if "original_max_position_embeddings" in parameters:
        small["original_max_position_embeddings"] = SIZES["original_max_position_embeddings"]
    return small


def _layers(default: PreTrainedConfig) -> dict[str, Any]:
    """The number of layers, and the lists with an item per layer, cut to the layers that stay."""
    name = next((name for name in LAYERS if isinstance(_own(default, name), int)), None)
    if name is None:
        return {}
    count = getattr(default, name)
    fields = [field.name for field in dataclasses.fields(default)]
    lists = {field: value for field in fields if _is_per_layer(value := _value(default, field), count)}
    if not lists:
        return {}
    kept = _kinds_shown(list(zip(*lists.values(), strict=True)))
    return {name: len(kept), **{field: [value[index] for index in kept] for field, value in lists.items()}}


def _value(default: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(default, name, None)
    except Exception:  # attributes that differ from layer to layer have no value
        return getattr(type(default), name, None)


def _own(default: PreTrainedConfig, name: str) -> Any:
    return getattr(default, name, None) if name in {f.name for f in dataclasses.fields(default)} else None


def _is_per_layer(value: Any, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count and all(isinstance(v, (str, int)) for v in value)


def _kinds_shown(items: list[tuple[Any, ...]]) -> list[int]:
    """Indices of the first layer of each kind, in order; with one kind, those of the first and the last layer."""
    first: dict[tuple[Any, ...], int] = {}
    for index, item in enumerate(items):
        first.setdefault(item, index)
    kept = list(first.values())[:4]
    if len(kept) < 2:
        kept.append(len(items) - 1)
    return sorted(set(kept))


def _parts(default: PreTrainedConfig) -> dict[str, Any]:
    """The configs within the config, shrunk."""
    parts: dict[str, Any] = {}
    for name in getattr(default, "sub_configs", {}):
        part = _value(default, name)
        if isinstance(part, PreTrainedConfig):
            parts[name] = shrunk(type(part), part)
    return parts


def _tokens(default: PreTrainedConfig) -> dict[str, Any]:
    """Ids of special tokens: within the vocabulary, above the ids of prompts."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(default):
        value = _value(default, field.name)
        if field.name in _ORDINARY_TOKENS:
            values[field.name] = _ORDINARY_TOKENS[field.name]
        elif field.name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= 0:
            values[field.name] = VOCABULARY - 1 - len(values)
    return values
