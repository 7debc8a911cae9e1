"""What a model's config says of its cache: the kinds of its layers, and whether it can have one of ours at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

from hf_kvcache.codecs.base import side_format
from hf_kvcache.eviction import Policy, available, resolve
from hf_kvcache.eviction.options import EvictionOptions, LayerPlace
from hf_kvcache.integration.architecture import architecture
from hf_kvcache.integration.rope import reason_against
from hf_kvcache.integration.versions import RELEASE, layer_types
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.cross_attention import CrossAttentionLayer, cross_attention_layers
from hf_kvcache.layers.evicting import ATTENDS_OUTSIDE, EvictingLayer
from hf_kvcache.layers.evicting_mla import EvictingLatentLayer, check_policy
from hf_kvcache.layers.mla import IndexedLatentLayer, LatentLayer
from hf_kvcache.layers.options import LayerOptions

#: Layer types whose keys and values are ours; the others keep transformers' own layers.
OWN_LAYER_TYPES = ("full_attention", "sliding_attention")
#: Parts of the names that configs give to the width of a head, and to that of all heads together.
_WIDTHS, _WHOLE = ("dim", "rank", "channels"), ("hidden_size", "d_model", "n_embd", "embed_dim", "attn_dim")
#: Layers that attend to what an indexer chooses; ours where they cache latents.
INDEXED = "indexed_attention"


def check_states(config: PreTrainedConfig, key_states: torch.Tensor) -> None:
    """Raise ValueError where keys ``[B, Hkv, T, Dk]`` cannot come from a model with this config.

    What a model caches is not always its ``num_key_value_heads`` by its ``head_dim``, and families have names of their
    own for both. So any number that the config, or a part of it, calls heads or a width is taken as possible, and so is
    any size of a whole layer divided by a number of heads.
    """
    if key_states.dim() != 4:
        return
    named = list(_numbers(config))
    heads = {value for name, value in named if "head" in name and "dim" not in name} | {1}
    widths = {value for name, value in named if any(part in name for part in _WIDTHS)}
    widths |= {whole // part for name, whole in named if any(n in name for n in _WHOLE) for part in heads if part > 0}
    if key_states.shape[1] not in heads or key_states.shape[3] not in widths:
        raise ValueError(
            f"key_states of shape {list(key_states.shape)} do not come from the {config.model_type!r} model whose "
            f"config this cache was built for; accepted: heads {sorted(heads)}, dim {sorted(widths)}"
        )


def _numbers(config: Any) -> Iterator[tuple[str, int]]:
    """The whole numbers in a config and its parts, by every name that they go by."""
    if isinstance(config, PreTrainedConfig):
        for common in config.attribute_map:
            yield from _numbers({common: getattr(config, common, None)})
        config = config.to_dict()
    for name, value in config.items():
        if isinstance(value, dict):  # layers that differ (Gemma 4), a part for attention alone (DBRX)
            yield from _numbers({str(key): inner for key, inner in value.items()})
        elif isinstance(value, int) and not isinstance(value, bool):
            yield name, value


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the decoder; raises for anything that cannot have a KV cache of ours."""
    if not isinstance(config, PreTrainedConfig):
        hint = ". Legacy tuples of keys and values cannot be converted" if isinstance(config, tuple) else ""
        raise TypeError(f"config is a {type(config).__name__}; accepted: a model's config (model.config){hint}")
    if config.is_encoder_decoder:
        raise ValueError(f"config of {config.model_type!r}: accepted: decoder-only models, this one has an encoder")
    decoder = config.get_text_config(decoder=True)
    if not _is_decoder(decoder):
        raise ValueError(f"config of {config.model_type!r}: accepted: models that generate, this one only encodes")
    if getattr(decoder, "num_hidden_layers", None) is None and getattr(decoder, "layer_types", None) is None:
        raise ValueError(
            f"config of {config.model_type!r} says nothing of its layers (num_hidden_layers); accepted: models with "
            "one stack of decoder layers"
        )
    known = architecture(decoder)
    if known is not None and not (known.storing and known.takes_cache):
        raise ValueError(
            f"config of {config.model_type!r}: {known.model.__name__} of transformers {RELEASE} keeps no "
            f"keys and values in a cache; accepted: models with layers of {' or '.join(OWN_LAYER_TYPES)} that do"
        )
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
    types, layer_arguments = _with_repeated(config, *layer_types(config))
    own = (*OWN_LAYER_TYPES, INDEXED) if options.latents == "native" else OWN_LAYER_TYPES
    if not set(types) & set(own):
        raise ValueError(
            f"config of {config.model_type!r} has layers of type {sorted(set(types))}; accepted: at least one of "
            f"{list(own)}, there is nothing to cache otherwise"
        )
    cross = cross_attention_layers(config)
    evicting = [i for i, layer_type in enumerate(types) if layer_type == "full_attention" and i not in cross]
    if options.eviction is None:
        evicting = []
    else:
        _check_eviction(config, types, evicting, options)
    layers: list[Any] = []
    for index, (layer_type, arguments) in enumerate(zip(types, layer_arguments, strict=True)):
        if options.eviction is not None and index in evicting:
            place = LayerPlace(index, config.num_hidden_layers, evicting.index(index), len(evicting))
            kind = EvictingLatentLayer if options.latents == "native" else EvictingLayer
            layers.append(kind(index, options, options.eviction, place))
        elif index in cross:
            layers.append(CrossAttentionLayer(index, options))
        elif layer_type in own:
            layers.append(_own_layer(index, layer_type, options, arguments.get("sliding_window")))
        else:
            layers.append(DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**arguments))
    return layers


def _with_repeated(
    config: PreTrainedConfig, types: list[str], arguments: list[dict[str, Any]]
) -> tuple[list[str], list[dict[str, Any]]]:
    """The layers of a model, and behind them once more those that it goes through several times."""
    again = _repeated(config)
    if again is None:
        return types, arguments
    turns = config.n_recurrent_loops - 1
    return [*types, *types[again] * turns], [*arguments, *arguments[again] * turns]


def _repeated(config: PreTrainedConfig) -> slice | None:
    """The layers of which each turn has keys and values of its own, which the model looks for behind all (Dory)."""
    if getattr(config, "recurrent_kv_cache_mode", None) != "per_loop":
        return None
    return slice(config.n_input_layers, config.n_input_layers + config.n_recurrent_layers)


def places_in_pass(config: PreTrainedConfig, layers: int) -> list[int]:
    """When a forward pass comes to each of a cache's ``layers``: in their order, but for those of later turns."""
    again, held = _repeated(config), list(range(layers))
    if again is None:
        return held
    own = config.num_hidden_layers
    order = [*held[: again.stop], *held[own:], *held[again.stop : own]]
    return [order.index(layer) for layer in held]


def _own_layer(index: int, layer_type: str, options: LayerOptions, sliding_window: int | None) -> KVCacheLayer:
    if options.latents == "native":
        kind = IndexedLatentLayer if layer_type == INDEXED else LatentLayer
        return kind(index, options, sliding_window)
    if options.latents is not None and index in options.latents:
        from hf_kvcache.layers.low_rank import LowRankLayer

        return LowRankLayer(index, options, options.latents[index], sliding_window)
    return KVCacheLayer(index, options, sliding_window)


def _check_eviction(config: PreTrainedConfig, types: list[str], evicting: list[int], options: LayerOptions) -> None:
    """Raise ValueError where a model has no layer that can evict."""
    known = architecture(config)
    if known is not None and set(known.outside) == set(known.storing):
        raise ValueError(
            f"config of {config.model_type!r}: {known.storing[0].__name__} of transformers {RELEASE} {ATTENDS_OUTSIDE}"
        )
    if INDEXED in types and not evicting:
        raise ValueError(
            f"config of {config.model_type!r}: an indexer chooses which tokens its layers attend to, and needs all of "
            "them; accepted: caches that do not evict, LatentKVCache(config) or QuantizedKVCache(config, bits=4)"
        )
    if not evicting:
        raise ValueError(
            f"config of {config.model_type!r}: all of its layers see a sliding window and hold no more than that; "
            "accepted with eviction: at least one layer of full attention"
        )
    if options.deferred and options.eviction is not None:
        _check_sharing(config, options.eviction)
    if options.eviction is not None:
        _check_positions(config, options.eviction.policy)
    if options.latents == "native" and options.eviction is not None:
        check_policy(options.eviction.policy, options.eviction.compensate)
    elif latent_ranks(config) or options.latents is not None:
        raise ValueError(
            f"config of {config.model_type!r}: {'a calibrated basis' if options.latents else 'latents as if keys'}; "
            "accepted with eviction: keys and values as they are, or a model's own latents (HeavyHitterCache)"
        )


def _check_sharing(config: PreTrainedConfig, eviction: EvictionOptions) -> None:
    """Raise ValueError for what would have to see the queries of layers that read the keys of others."""
    why = f"config of {config.model_type!r}: some layers read the keys of others, and their queries are not seen"
    if eviction.compensate:
        raise ValueError(f"compensate={eviction.compensate!r} with a {why}; accepted: 0")
    if eviction.policy.needs_replay:
        raise ValueError(f"policy={eviction.policy!r} with a {why}; accepted: policies that do not read again")


def _check_positions(config: PreTrainedConfig, policy: Policy) -> None:
    """Raise ValueError now where a policy would find at its first choice that it cannot undo rotary positions."""
    why = reason_against(config) if policy.needs_rope or policy.moves_sinks else None
    if why is not None:
        others = ", ".join(repr(name) for name in available() if not resolve(name).needs_rope)
        raise ValueError(
            f"policy={policy!r} undoes rotary positions, which cannot be done for a {config.model_type!r} model: {why}"
            f"; accepted here: {others}, without reindex=True"
        )


def check_formats(config: PreTrainedConfig, options: LayerOptions) -> None:
    """Raise now what the codec would raise at the first update, where the config tells the width of keys and values."""
    for key_width, value_width in _widths(config, options):
        for side, width in ((options.codec.keys, key_width), (options.codec.values, value_width)):
            if width is not None:
                side_format(side, width, options.page_size, torch.float32)


def _widths(config: PreTrainedConfig, options: LayerOptions) -> set[tuple[int | None, int | None]]:
    """What pages hold of keys and of values; None where the config does not tell."""
    if isinstance(options.latents, dict):
        return {(layer.keys.rank, layer.values.rank) for layer in options.latents.values()}
    widths: set[tuple[int | None, int | None]] = set()
    for layer in layer_configs(config):
        rank = getattr(layer, "kv_lora_rank", None)
        if rank is None:
            widths.add((getattr(layer, "head_dim", None),) * 2)
        elif options.latents == "native":
            widths.add((rank, getattr(layer, "qk_rope_head_dim", None)))
    return widths


def latent_ranks(config: PreTrainedConfig) -> set[int]:
    """Widths of the latents that the model's layers cache themselves."""
    ranks = {getattr(layer, "kv_lora_rank", None) for layer in layer_configs(config)}
    return {rank for rank in ranks if rank is not None}


def layer_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The config of each layer where they differ, else that of all."""
    return getattr(config, "per_layer_config", None) or [config]


def borrowing_layers(config: PreTrainedConfig) -> frozenset[int]:
    """The layers that read what others hold and have no tokens of their own, where they have a layer in the cache."""
    modes = getattr(config, "kv_sharing_modes", None) or []
    return frozenset(index for index, mode in enumerate(modes) if mode is not None and mode.startswith("reuse"))


def shares_keys(config: PreTrainedConfig) -> bool:
    """Whether some layers read the keys and values of others."""
    return getattr(config, "kv_sharing_modes", None) is not None or bool(getattr(config, "num_kv_shared_layers", 0))
