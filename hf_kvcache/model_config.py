"""What a model's config says of its cache: the kinds of its layers, and whether it can have one of ours at all."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from hf_kvcache.evicting_layer import EvictingLayer
from hf_kvcache.layer import KVCacheLayer, LayerOptions

#: Layer types whose keys and values are ours; the others keep transformers' own layers.
OWN_LAYER_TYPES = ("full_attention", "sliding_attention")


def check_states(config: PreTrainedConfig, key_states: torch.Tensor) -> None:
    """Raise ValueError where keys ``[B, Hkv, T, Dk]`` cannot come from a model with this config.

    What a model caches is not always its ``num_key_value_heads`` by its ``head_dim``: shared heads, latents and rotary
    parts have names of their own. So any number that the config calls heads, or a width, is taken as possible.
    """
    numbers = {name: value for name, value in config.to_dict().items() if isinstance(value, int)}
    named = list(numbers.items())
    for own in (config.to_dict().get("per_layer_config") or {}).values():  # layers that differ (Gemma 4)
        named += [(name, value) for name, value in own.items() if isinstance(value, int)]
    heads = {value for name, value in named if "head" in name and "dim" not in name} | {1}
    widths = {value for name, value in named if "dim" in name or "rank" in name}
    if "hidden_size" in numbers and numbers.get("num_attention_heads"):
        widths.add(numbers["hidden_size"] // numbers["num_attention_heads"])
    if key_states.dim() == 4 and (key_states.shape[1] not in heads or key_states.shape[3] not in widths):
        raise ValueError(
            f"key_states of shape {list(key_states.shape)} do not come from the {config.model_type!r} model whose "
            f"config this cache was built for; accepted: heads {sorted(heads)}, dim {sorted(widths)}"
        )


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the decoder; raises for anything that cannot have a KV cache of ours."""
    if not isinstance(config, PreTrainedConfig):
        hint = ". Legacy tuples of past_key_values cannot be converted" if isinstance(config, tuple) else ""
        raise TypeError(f"config is a {type(config).__name__}; accepted: a model's config (model.config){hint}")
    if config.is_encoder_decoder:
        raise ValueError(f"config of {config.model_type!r}: accepted: decoder-only models, this one has an encoder")
    decoder = config.get_text_config(decoder=True)
    if not _is_decoder(decoder):
        raise ValueError(f"config of {config.model_type!r}: accepted: models that generate, this one only encodes")
    return decoder


def _is_decoder(config: PreTrainedConfig) -> bool:
    """Whether the config is of a model that generates text token by token."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return bool(getattr(config, "is_decoder", False))  # BERT and its kin are decoders only if told so
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return known or getattr(config, "vocab_size", None) is not None


def make_layers(config: PreTrainedConfig, options: LayerOptions) -> list[Any]:
    layer_types, layer_arguments = _layer_types(config)
    if not set(layer_types) & set(OWN_LAYER_TYPES):
        raise ValueError(
            f"config of {config.model_type!r} has layers of type {sorted(set(layer_types))}; accepted: at least one of "
            f"{list(OWN_LAYER_TYPES)}, there is nothing to cache otherwise"
        )
    layers: list[Any] = []
    evicting = [index for index, layer_type in enumerate(layer_types) if layer_type == "full_attention"]
    if options.eviction is not None:
        _check_eviction(config, evicting, options)
    for index, (layer_type, arguments) in enumerate(zip(layer_types, layer_arguments, strict=True)):
        if options.eviction is not None and index in evicting:
            place = evicting.index(index), len(evicting)
            layers.append(EvictingLayer(index, options, options.eviction, place))
        elif layer_type in OWN_LAYER_TYPES:
            layers.append(KVCacheLayer(index, options, arguments.get("sliding_window")))
        else:
            layers.append(DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**arguments))
    return layers


def _check_eviction(config: PreTrainedConfig, evicting: list[int], options: LayerOptions) -> None:
    """Raise ValueError where a model has no layer that can evict."""
    if not evicting:
        raise ValueError(
            f"config of {config.model_type!r}: all of its layers see a sliding window and hold no more than that; "
            "accepted with eviction: at least one layer of full attention"
        )
    if options.deferred:
        raise ValueError(
            f"config of {config.model_type!r}: some layers read the keys of others, which would not see their queries; "
            "accepted with eviction: models whose layers have keys of their own"
        )
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(
            f"config of {config.model_type!r} caches latents, which are expanded to keys in every step; accepted with "
            "eviction: models that cache keys and values"
        )


def check_formats(config: PreTrainedConfig, options: LayerOptions) -> None:
    """Raise now what the codec would raise at the first update, where the config tells the width of keys and values."""
    if getattr(config, "kv_lora_rank", None) is not None:
        return  # latents are cached, not heads
    widths = {getattr(layer, "head_dim", None) for layer in getattr(config, "per_layer_config", [config])}
    for width in widths:
        if width is None:
            continue
        for side in (options.codec.keys, options.codec.values):
            side.format(width, options.page_size, torch.float32)


def shares_keys(config: PreTrainedConfig) -> bool:
    """Whether some layers read the keys and values of others."""
    return getattr(config, "kv_sharing_modes", None) is not None or bool(getattr(config, "num_kv_shared_layers", 0))


def _layer_types(config: PreTrainedConfig) -> tuple[list[str], list[dict[str, Any]]]:
    """Type and constructor arguments of each layer, as transformers' own caches would have them."""
    layer_types, arguments = get_layer_types_and_kwargs(config)
    if isinstance(arguments, dict):  # transformers before 5.19: one set of arguments for all layers
        common = arguments
        arguments = [
            {name: value for name, value in common.items() if name != "sliding_window" or "sliding" in layer_type}
            for layer_type in layer_types
        ]
    return layer_types, arguments
