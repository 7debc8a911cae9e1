"""Reading a model's config: which layers its cache needs, and whether this package supports the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

from hf_kvcache.cache.compressed_config import compressed_layer
from hf_kvcache.codecs.base import side_format
from hf_kvcache.eviction import Policy, available, resolve
from hf_kvcache.eviction.options import EvictionOptions, LayerPlace
from hf_kvcache.integration.architecture import architecture, recomputing
from hf_kvcache.integration.layer_configs import layer_configs
from hf_kvcache.integration.rope import reason_against
from hf_kvcache.integration.versions import RELEASE, layer_types
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.cross_attention import CrossAttentionLayer, cross_attention_layers
from hf_kvcache.layers.evicting import ATTENDS_OUTSIDE, EvictingLayer
from hf_kvcache.layers.evicting_mla import EvictingLatentLayer, check_policy
from hf_kvcache.layers.indexed import IndexedLayer
from hf_kvcache.layers.mla import IndexedLatentLayer, LatentLayer
from hf_kvcache.layers.options import LayerOptions
from hf_kvcache.layers.own import OwnLayer
from hf_kvcache.layers.sparse import SparseEvictingLayer, SparseLayer, SparseReads
from hf_kvcache.layers.static import StaticLayer
from hf_kvcache.utils.validation import whole

#: Layer types for which this package has layers; for other types the cache has transformers' own layers.
OWN_LAYER_TYPES = ("full_attention", "sliding_attention")
#: Parts of the names of config attributes: first for the width of a head, then for the width of all heads together.
_WIDTHS, _WHOLE = ("dim", "rank", "channels"), ("hidden_size", "d_model", "n_embd", "embed_dim", "attn_dim")
#: Layer type whose indexer chooses the tokens to attend to. This package has such a layer for models with latents.
INDEXED = "indexed_attention"
#: Layer types of keys and values with the keys of an indexer beside them, which a modeling file registers.
KEYED = ("minimax_m3_sparse",)


def check_states(config: PreTrainedConfig, key_states: torch.Tensor) -> None:
    """Raise ValueError if keys ``[B, Hkv, T, Dk]`` cannot come from a model with this config.

    Models do not always cache ``num_key_value_heads`` heads of width ``head_dim``, and some configs use other names. So
    the check accepts every number of heads and every width that the config or one of its parts has. It also accepts the
    width of a layer divided by a number of heads.
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
    """Yield the name and value of every whole number in a config and its parts; aliases yield their own names."""
    if isinstance(config, PreTrainedConfig):
        for common in config.attribute_map:
            yield from _numbers({common: getattr(config, common, None)})
        config = config.to_dict()
    for name, value in config.items():
        if isinstance(value, dict):  # configs of single layers (Gemma 4), a config for attention (DBRX)
            yield from _numbers({str(key): inner for key, inner in value.items()})
        elif isinstance(value, int) and not isinstance(value, bool):
            yield name, value


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the model's decoder.

    Raises:
        TypeError: if ``config`` is not a model's config.
        ValueError: if this package has no cache for such a model.
    """
    if not isinstance(config, PreTrainedConfig):
        hint = ". Legacy tuples of keys and values cannot be converted" if isinstance(config, tuple) else ""
        raise TypeError(f"config is a {type(config).__name__}; accepted: a model's config (model.config){hint}")
    if config.is_encoder_decoder:
        raise ValueError(f"config of {config.model_type!r} has an encoder; accepted: decoder-only models")
    decoder = config.get_text_config(decoder=True)
    if not _is_decoder(decoder):
        raise ValueError(f"config of {config.model_type!r} only encodes; accepted: models that generate")
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
        return bool(getattr(config, "is_decoder", False))  # BERT and similar models can be decoders
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return known or getattr(config, "vocab_size", None) is not None


def make_layers(config: PreTrainedConfig, options: LayerOptions) -> list[Any]:
    """The empty layers of a cache, this package's and transformers' own.

    Args:
        config: the config of the model's decoder.
        options: the settings that all layers of this package share.

    Raises:
        ValueError: if the model has no layer for this package, or none that can evict although ``options`` ask for it.
    """
    types, layer_arguments = _with_loops(config, *layer_types(config))
    if options.compressed is not None:
        if options.offload is not None:
            raise ValueError(f"offload= with a {config.model_type!r} model, whose layers have no pages; accepted: None")
        return [compressed_layer(index, kind, config, options) for index, kind in enumerate(types)]
    own = (*OWN_LAYER_TYPES, INDEXED) if options.latents == "native" else (*OWN_LAYER_TYPES, *KEYED)
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
        own_options = options.of_layer(index) if layer_type in own else options
        if options.eviction is not None and index in evicting:
            place = LayerPlace(index, config.num_hidden_layers, evicting.index(index), len(evicting))
            kind = EvictingLatentLayer if options.latents == "native" else EvictingLayer
            if options.sparse is not None:
                kind = SparseEvictingLayer
            layers.append(kind(index, own_options, options.eviction, place))
        elif index in cross:
            layers.append(CrossAttentionLayer(index, own_options))
        elif options.sparse is not None and layer_type == "full_attention":
            layers.append(SparseLayer(index, own_options))
        elif layer_type in own:
            layers.append(_own_layer(index, layer_type, own_options, arguments.get("sliding_window")))
        else:
            layers.append(DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**arguments))
    if options.sparse is not None:
        _divide(config, options, layers)
    return layers


def _divide(config: PreTrainedConfig, options: LayerOptions, layers: list[Any]) -> None:
    """Say which layers read everything, and which read what another one has chosen.

    Raises:
        ValueError: if no layer reads sparsely, the selector cannot choose for this cache, or a setting does not go with
            sparse reading.
    """
    sparse = options.sparse
    assert sparse is not None
    for name in ("latents", "max_length"):
        if (given := getattr(options, name)) is not None:
            shown = given if isinstance(given, str | int) else type(given).__name__
            raise ValueError(f"{name}={shown!r} with sparse reading; accepted: {name}=None, or sparse=None")
    able = [layer for layer in layers if isinstance(layer, SparseReads)]
    for layer in able[: sparse.dense_layers]:
        layer.dense = True
    able = able[sparse.dense_layers :]
    if not able:
        raise ValueError(
            f"dense_layers={sparse.dense_layers!r} for a {config.model_type!r} model; accepted: fewer than its layers "
            f"of full attention, {sum(isinstance(layer, SparseReads) for layer in layers)}"
        )
    if not sparse.selector.shared:
        for number, layer in enumerate(able):
            layer.depth = number / (len(able) - 1) if len(able) > 1 else 0.5
        return
    if options.eviction is not None:
        raise ValueError(
            f"selector={sparse.selector!r} with eviction: each layer keeps other tokens, so one cannot choose for "
            "another; accepted: another selector, or budget=None"
        )
    leaders = sparse.selector.leaders([layer.index for layer in able])
    for layer in able:
        layer.leader_index = None if leaders[layer.index] == layer.index else leaders[layer.index]


def _with_loops(
    config: PreTrainedConfig, types: list[str], arguments: list[dict[str, Any]]
) -> tuple[list[str], list[dict[str, Any]]]:
    """The types and arguments of a model's layers. Layers that run several times are appended for each later run."""
    looped = _looped_layers(config)
    if looped is None:
        return types, arguments
    later_runs = config.n_recurrent_loops - 1
    return [*types, *types[looped] * later_runs], [*arguments, *arguments[looped] * later_runs]


def cached_layers(config: PreTrainedConfig) -> tuple[list[str], list[int], int]:
    """The types of a cache's layers, the model's layer that each belongs to, and the number of the model's layers.

    A model can have more layers than its cache (the last ones read what others hold), or fewer (some run repeatedly).
    """
    types, _ = layer_types(config)
    looped, held = _looped_layers(config), len(types)
    count = max(held, getattr(config, "num_hidden_layers", None) or 0)
    of_model = list(range(held))
    if looped is not None:
        of_model += of_model[looped] * (config.n_recurrent_loops - 1)
    return _with_loops(config, types, [{}] * held)[0], of_model, count


def _looped_layers(config: PreTrainedConfig) -> slice | None:
    """The layers that run several times with keys and values for each run (Dory); None if there are none."""
    if getattr(config, "recurrent_kv_cache_mode", None) != "per_loop":
        return None
    return slice(config.n_input_layers, config.n_input_layers + config.n_recurrent_layers)


def places_in_pass(config: PreTrainedConfig, layers: int) -> list[int]:
    """For each of a cache's ``layers`` its place in a forward pass. Only layers of later runs are out of order."""
    looped, held = _looped_layers(config), list(range(layers))
    if looped is None:
        return held
    own = config.num_hidden_layers
    order = [*held[: looped.stop], *held[own:], *held[looped.stop : own]]
    return [order.index(layer) for layer in held]


def _own_layer(index: int, layer_type: str, options: LayerOptions, sliding_window: int | None) -> OwnLayer:
    if layer_type in KEYED:
        return IndexedLayer(index, options)
    if options.max_length is not None:
        return StaticLayer(index, options, sliding_window)
    if options.latents == "native":
        kind = IndexedLatentLayer if layer_type == INDEXED else LatentLayer
        return kind(index, options, sliding_window)
    if options.latents is not None and index in options.latents:
        from hf_kvcache.layers.low_rank import LowRankLayer

        return LowRankLayer(index, options, options.latents[index], sliding_window)
    return KVCacheLayer(index, options, sliding_window)


def check_static(config: PreTrainedConfig, options: LayerOptions, bind: bool) -> None:
    """Raise ValueError if a cache with these settings cannot have a maximum length."""
    whole("max_length", options.max_length, options.sink_length + options.tail_length + options.page_size)
    given = f"max_length={options.max_length!r}"
    if not bind:
        raise ValueError(f"bind=False with {given}; accepted: bind=True, since compiled code reads the pages only")
    if options.eviction is not None or options.latents is not None:
        what = "eviction" if options.eviction is not None else "latents"
        raise ValueError(f"{given} with {what}; accepted: caches that hold keys and values of every token")
    types, _ = layer_types(config)
    other, known = sorted(set(types) - set(OWN_LAYER_TYPES)), architecture(config)
    if options.deferred:
        why = "some layers read the keys of others"
    elif cross_attention_layers(config):
        why = "some layers attend to an image"
    elif other:
        why = f"it has layers of type {', '.join(other)}"
    elif recomputing(config) is not None:
        why = "it drops its cache where its rotary embedding changes"
    elif known is not None and known.outside:
        why = f"{known.outside[0].__name__} attends in code of its own"
    else:
        return
    raise ValueError(
        f"{given} for a {config.model_type!r} model: {why}; accepted: max_length=None, or models "
        f"in which every layer has keys and values of its own ({', '.join(OWN_LAYER_TYPES)})"
    )


def _check_eviction(config: PreTrainedConfig, types: list[str], evicting: list[int], options: LayerOptions) -> None:
    """Raise ValueError if a model has no layer that can evict, or the policy does not work with it."""
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
            f"config of {config.model_type!r}: all of its layers have a sliding window and hold only its tokens; "
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
            f"config of {config.model_type!r}: {'a low-rank basis' if options.latents else 'latents stored as keys'} "
            "cannot be combined with eviction; accepted: keys and values, or a model's own latents (HeavyHitterCache)"
        )


def _check_sharing(config: PreTrainedConfig, eviction: EvictionOptions) -> None:
    """Raise ValueError for eviction methods that need the queries of layers that read the keys of other layers."""
    why = f"config of {config.model_type!r}: some layers read the keys of others, and their queries are not seen"
    if eviction.compensate:
        raise ValueError(f"compensate={eviction.compensate!r} with a {why}; accepted: 0")
    if eviction.policy.needs_replay:
        raise ValueError(f"policy={eviction.policy!r} with a {why}; accepted: policies that do not read again")


def _check_positions(config: PreTrainedConfig, policy: Policy) -> None:
    """Raise ValueError if a policy must undo rotary positions, and those of this model cannot be undone."""
    why = reason_against(config) if policy.needs_rope or policy.moves_sinks else None
    if why is not None:
        others = ", ".join(repr(name) for name in available() if not resolve(name).needs_rope)
        raise ValueError(
            f"policy={policy!r} undoes rotary positions, which cannot be done for a {config.model_type!r} model: {why}"
            f"; accepted here: {others}, without reindex=True"
        )


def check_formats(config: PreTrainedConfig, options: LayerOptions) -> None:
    """Raise ValueError if the codec cannot store keys and values of the widths that the config has.

    Widths that the config does not have are checked at the first update.
    """
    for key_width, value_width in _widths(config, options):
        for codec in options.codec.all():
            for side, width in ((codec.keys, key_width), (codec.values, value_width)):
                if width is not None:
                    side_format(side, width, options.page_size, torch.float32)


def _widths(config: PreTrainedConfig, options: LayerOptions) -> set[tuple[int | None, int | None]]:
    """The widths of keys and of values in pages, for all layers; None for a width that the config does not have."""
    if (packed := options.compressed) is not None:
        return {(packed.width - packed.rotary, packed.rotary)}
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
    """The widths of the latents that the model caches; empty if it has none."""
    ranks = {getattr(layer, "kv_lora_rank", None) for layer in layer_configs(config)}
    return {rank for rank in ranks if rank is not None}


def borrowing_layers(config: PreTrainedConfig) -> frozenset[int]:
    """The numbers of the layers that read the keys and values of other layers and store none themselves."""
    modes = getattr(config, "kv_sharing_modes", None) or []
    return frozenset(index for index, mode in enumerate(modes) if mode is not None and mode.startswith("reuse"))


def shares_keys(config: PreTrainedConfig) -> bool:
    """Whether some layers read the keys and values of other layers."""
    return getattr(config, "kv_sharing_modes", None) is not None or bool(getattr(config, "num_kv_shared_layers", 0))
