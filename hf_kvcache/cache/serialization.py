"""Saving a cache as a flat dictionary of tensors, and restoring it. Packed pages are saved as they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence, Set
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_kvcache.cache import other_layers
from hf_kvcache.cache.model_config import check_states, make_layers
from hf_kvcache.codecs import Codec
from hf_kvcache.codecs.mixed import MixedCodec
from hf_kvcache.integration.layer_configs import of_layers
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.compressed import WindowLayer
from hf_kvcache.layers.options import LayerOptions
from hf_kvcache.lowrank.projection import LayerProjection

#: Version of the format, incremented when the meaning of the tensors changes.
_FORMAT = 4
_META = "meta"
#: The layers of this package that can be saved.
_OWN = (KVCacheLayer, WindowLayer)
#: Attributes of a config that decide the shapes in a cache.
_SHAPE = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "sliding_window",
    "compress_rates",
    "index_head_dim",
)


def export_state(layers: Sequence[Any], options: LayerOptions) -> dict[str, torch.Tensor]:
    """The tensors of every layer as ``layers.<index>.<name>``, and the settings as JSON bytes under ``meta``.

    Args:
        layers: the layers of a cache, transformers' own included.
        options: the settings that all layers of this package share.

    Raises:
        ValueError: if a layer of transformers' own holds something that is neither a tensor nor a plain value.
    """
    state: dict[str, torch.Tensor] = {}
    layer_values = []
    for index, layer in enumerate(layers):
        tensors, values = _export_layer(index, layer)
        layer_values.append({"kind": type(layer).__name__, **values})
        state |= {f"layers.{index}.{name}": tensor for name, tensor in tensors.items()}
    listed = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in state.items()}
    return {_META: _encode_meta(describe_settings(options) | {"layers": layer_values, "tensors": listed})} | state


def import_state(
    layers: Sequence[Any],
    options: LayerOptions,
    in_every_pass: Set[int],
    state: dict[str, torch.Tensor],
    device: torch.device | str | None,
    owned: bool = False,
) -> list[Any]:
    """Make layers with a saved content.

    Args:
        layers: the layers of a cache with the same settings. They are not changed.
        options: the settings that all layers of this package share.
        in_every_pass: numbers of the layers to which every forward pass adds tokens.
        state: what :func:`export_state` returned.
        device: where the new layers are to lie; see :meth:`hf_kvcache.KVCache.load_state_dict`.
        owned: whether nobody else has the tensors of ``state``; then those that need not move are not copied.

    Returns:
        New layers, one for each of ``layers``.

    Raises:
        ValueError: if the state was not made by this package, was saved with other settings or layers, or is damaged.
    """
    meta = _decode_meta(state)
    for name, value in describe_settings(options).items():
        _compare(name, meta.get(name), value)
    _check_listed(meta, state)
    if len(meta["layers"]) != len(layers):
        raise ValueError(f"state has {len(meta['layers'])} layers; accepted by this cache: {len(layers)}")
    restored: list[Any] = []
    fresh = make_layers(_config(options), options)
    for index, (layer, values) in enumerate(zip(layers, meta["layers"], strict=True)):
        prefix = f"layers.{index}."
        tensors = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
        empty = layer.blank() if isinstance(layer, _OWN) else fresh[index]
        restored.append(_import_layer(options, index, empty, tensors, values, device, owned))
    _check_lengths(restored, in_every_pass)
    return restored


def _config(options: LayerOptions) -> PreTrainedConfig:
    assert options.config is not None
    return options.config


def _export_layer(index: int, layer: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    if isinstance(layer, _OWN):
        return layer.tensors(), layer.progress()
    return other_layers.tensors(index, layer), other_layers.plain_values(layer)


def _import_layer(
    options: LayerOptions,
    index: int,
    layer: Any,
    tensors: dict[str, torch.Tensor],
    values: dict[str, Any],
    device: Any,
    owned: bool,
) -> Any:
    """Fill an empty layer with its saved content; raises ValueError if the content is not that of such a layer."""
    if values.get("kind") != type(layer).__name__:
        raise ValueError(
            f"layer {index} of the state is a {values.get('kind')}, of this cache a {type(layer).__name__}; "
            "accepted: a state of a cache of the same class and model"
        )
    try:
        if not isinstance(layer, _OWN):
            other_layers.restore(layer, tensors, values, device, owned)
            return layer
        if tensors and isinstance(layer, KVCacheLayer):
            check_states(_config(options), tensors["dense.keys"])
            layer.check_tensors(tensors, values)
        layer.restore(tensors, values, device, owned)
        layer.check()
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"layer {index} of the state does not fit this cache, or is damaged: {what}") from error
    return layer


def _check_lengths(layers: list[Any], in_every_pass: Set[int]) -> None:
    """Raise ValueError if layers hold different numbers of sequences or tokens."""
    own = [layer for layer in layers if isinstance(layer, _OWN) and layer.is_initialized]
    for what, numbers in (
        ("sequences", {layer.batch_size for layer in own}),
        ("tokens", {layer.get_seq_length() for layer in own if layer.index in in_every_pass}),
    ):
        if len(numbers) > 1:
            raise ValueError(
                f"state is damaged: its layers have seen {sorted(numbers)} {what}; accepted: equal numbers"
            )


def _check_listed(meta: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless the state has exactly the tensors that were saved, with their dtypes and shapes."""
    listed: dict[str, Any] = meta["tensors"]
    given = set(state) - {_META}
    if missing := sorted(set(listed) - given):
        raise ValueError(
            f"state is damaged: it has no {missing[0]!r} ({len(missing)} of {len(listed)} tensors missing)"
        )
    if extra := sorted(given - set(listed)):
        raise ValueError(f"state has {extra[0]!r}, which was not saved with it ({len(extra)} such names)")
    for name, (dtype, shape) in listed.items():
        tensor = state[name]
        found = [str(tensor.dtype), list(tensor.shape)] if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        if found != [dtype, shape]:
            raise ValueError(f"state is damaged: {name!r} is {found}, saved was {[dtype, shape]}")


def _compare(name: str, saved: Any, own: Any) -> None:
    if isinstance(saved, dict) and isinstance(own, dict):
        for key in own | saved:
            _compare(key, saved.get(key), own.get(key))
    elif saved != own:
        raise ValueError(f"state was saved with {name}={saved!r}; accepted by this cache: {own!r}")


def describe_settings(options: LayerOptions) -> dict[str, Any]:
    config = _config(options)
    return {
        "format": _FORMAT,
        "model_type": config.model_type,
        "model": {name: of_layers(config, name) for name in _SHAPE},
        "codec": _describe(options.codec),
        "sink_length": options.sink_length,
        "tail_length": options.tail_length,
        "page_size": options.page_size,
        "eviction": None if options.eviction is None else options.eviction.describe(),
        "compressed": _describe_compressed(options),
        "latents": _digest(options.latents) if isinstance(options.latents, dict) else options.latents,
    }


def _describe_compressed(options: LayerOptions) -> list[Any] | None:
    packed = options.compressed
    return None if packed is None else [packed.bits, packed.window_bits, packed.width, packed.rotary]


def _digest(layers: dict[int, LayerProjection]) -> str:
    """A digest of the low-rank bases of a cache. With other bases, saved pages would decode to other values."""
    digest = hashlib.sha256()
    for index, layer in sorted(layers.items()):
        digest.update(f"{index} {layer.heads} {layer.before_rope}".encode())
        for side in (layer.keys, layer.values):
            for part in (side.down, side.up, side.mean):
                digest.update(b"" if part is None else part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _describe(codec: Codec) -> str:
    """The codec with all of its options, which its repr leaves out."""
    if isinstance(codec, MixedCodec):
        return "; ".join(f"{index}: {_describe(of_layer)}" for index, of_layer in codec.layers.items())
    return f"{codec.name} keys={vars(codec.keys)} values={vars(codec.values)}"


def _encode_meta(meta: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8, device="cpu")


def _decode_meta(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    if _META not in state:
        raise ValueError(f"state has no {_META!r}; accepted: what KVCache.state_dict() returns")
    try:
        meta = json.loads(bytes(state[_META].tolist()).decode())
        if not (isinstance(meta["layers"], list) and isinstance(meta.setdefault("tensors", {}), dict)):
            raise TypeError
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"state is damaged: {_META!r} is not what KVCache.state_dict() wrote there") from error
    return meta
