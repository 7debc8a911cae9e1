"""A cache as a flat dictionary of tensors, and back: what is saved is what is held, packed pages as they are."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

from hf_kvcache.codecs import Codec
from hf_kvcache.latent.projection import LayerProjection
from hf_kvcache.layer import KVCacheLayer

if TYPE_CHECKING:
    from hf_kvcache.cache import KVCache

#: Raised when the meaning of the tensors changes.
_FORMAT = 4
_META = "meta"


def export_state(cache: KVCache) -> dict[str, torch.Tensor]:
    """The tensors of every layer as ``layers.<index>.<name>``, and the settings as JSON bytes under ``meta``.

    Raises:
        ValueError: if the cache has layers of transformers' own (hybrid models).
    """
    if foreign := sorted({type(layer).__name__ for layer in cache.layers if not isinstance(layer, KVCacheLayer)}):
        raise ValueError(f"layers of type {', '.join(foreign)} cannot be exported; accepted: KVCacheLayer only")
    state = {_META: _encode_meta(_settings(cache) | {"layers": [layer.progress() for layer in cache.own_layers]})}
    for layer in cache.own_layers:
        for name, tensor in layer.tensors().items():
            state[f"layers.{layer.index}.{name}"] = tensor
    return state


def import_state(cache: KVCache, state: dict[str, torch.Tensor]) -> None:
    """Make ``cache`` hold what ``state`` says, in place of what it holds.

    Raises:
        ValueError: if the state is none of ours, or of a cache with other settings or layers; nothing is changed then.
    """
    if _META not in state:
        raise ValueError(f"state has no {_META!r}; accepted: what KVCache.state_dict() returns")
    meta = json.loads(bytes(state[_META].tolist()).decode())
    expected = _settings(cache)
    for name, value in expected.items():
        if meta.get(name) != value:
            raise ValueError(f"state was saved with {name}={meta.get(name)!r}, this cache has {value!r}")
    if len(meta["layers"]) != len(cache.layers):
        raise ValueError(f"state has {len(meta['layers'])} layers, this cache has {len(cache.layers)}")
    by_layer: list[dict[str, torch.Tensor]] = [{} for _ in cache.layers]
    for key, tensor in state.items():
        if key != _META:
            _, index, name = key.split(".", 2)
            by_layer[int(index)][name] = tensor
    for layer, tensors, progress in zip(cache.own_layers, by_layer, meta["layers"], strict=True):
        layer.restore(tensors, progress)


def _settings(cache: KVCache) -> dict[str, Any]:
    options = cache.options
    return {
        "format": _FORMAT,
        "model_type": cache.config.model_type,
        "codec": _describe(options.codec),
        "sink_length": options.sink_length,
        "tail_length": options.tail_length,
        "page_size": options.page_size,
        "eviction": None if options.eviction is None else options.eviction.describe(),
        "latents": _digest(options.latents) if isinstance(options.latents, dict) else options.latents,
    }


def _digest(layers: dict[int, LayerProjection]) -> str:
    """What tells the bases of a cache from others: pages decode to something else under those."""
    digest = hashlib.sha256()
    for index, layer in sorted(layers.items()):
        digest.update(f"{index} {layer.heads} {layer.before_rope}".encode())
        for side in (layer.keys, layer.values):
            for part in (side.down, side.up, side.mean):
                digest.update(b"" if part is None else part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _describe(codec: Codec) -> str:
    """The codec with all that its pages depend on; its repr leaves out options such as the group size."""
    return f"{codec.name} keys={vars(codec.keys)} values={vars(codec.values)}"


def _encode_meta(meta: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)
