"""The settings of a cache as values for JSON, and a cache with such settings."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from hf_kvcache.codecs import Codec
from hf_kvcache.codecs.latent import LatentCodec
from hf_kvcache.codecs.mixed import MixedCodec
from hf_kvcache.codecs.registry import available as codec_names
from hf_kvcache.codecs.registry import resolve as resolve_codec
from hf_kvcache.eviction import Policy
from hf_kvcache.eviction import resolve as resolve_policy
from hf_kvcache.eviction.budget import Budget, Pins
from hf_kvcache.eviction.options import EvictionOptions
from hf_kvcache.eviction.wrapper import Wrapper
from hf_kvcache.layers.options import CompressedOptions, LayerOptions
from hf_kvcache.lowrank.projection import LayerProjection, SideProjection
from hf_kvcache.sparse.budget import ReadBudget
from hf_kvcache.sparse.reader import SparseOptions
from hf_kvcache.sparse.registry import registered as selectors
from hf_kvcache.sparse.registry import resolve as resolve_selector

_SIZES = ("sink_length", "tail_length", "page_size", "validate", "deferred")
_EVICTION = ("evict_prefill", "interval", "seed", "compensate")
_SIDES = ("keys", "values")
#: Beginning of the names of the tensors of low-rank bases.
BASES = "bases."


def describe(options: LayerOptions) -> dict[str, Any]:
    """The settings as values for JSON, from which :func:`rebuild` makes them again.

    Raises:
        ValueError: if a codec or a policy cannot be described: it is not registered, or has an argument that is neither
            a number nor a string.
    """
    eviction, latents = options.eviction, options.latents
    found: dict[str, Any] = {name: getattr(options, name) for name in _SIZES}
    found["codec"] = _codec(options.codec)
    if options.compressed is not None:
        found["compressed"] = asdict(options.compressed)
    if eviction is not None:
        found["eviction"] = {name: getattr(eviction, name) for name in _EVICTION} | {
            "policy": _policy(eviction.policy),
            "budget": [eviction.budget.amount, eviction.budget.least],
            "pinned": eviction.pins.span,
            "pin_mask": None if eviction.pins.mask is None else eviction.pins.mask.tolist(),
        }
    if options.sparse is not None:
        found["sparse"] = _sparse(options.sparse)
    if isinstance(latents, dict):
        found["bases"] = {
            index: [layer.heads, layer.before_rope, None if layer.weights is None else list(layer.weights)]
            for index, layer in latents.items()
        }
    else:
        found["latents"] = latents
    return found


def bases(options: LayerOptions) -> dict[str, torch.Tensor]:
    """The tensors of the low-rank bases by name; none if there are no bases."""
    if not isinstance(options.latents, dict):
        return {}
    return {
        f"{BASES}{index}.{side}.{name}": part
        for index, layer in options.latents.items()
        for side in _SIDES
        for name in ("down", "up", "mean")
        if (part := getattr(getattr(layer, side), name)) is not None
    }


def rebuild(described: dict[str, Any], tensors: dict[str, torch.Tensor], config: Any) -> LayerOptions:
    """The settings that :func:`describe` and :func:`bases` described, for a model with ``config``.

    Raises:
        KeyError, TypeError, ValueError: if something is missing or not known.
    """
    latents = described.get("latents")
    if "bases" in described:
        latents = {int(index): _layer(index, about, tensors) for index, about in described["bases"].items()}
    eviction, packed, sparse = (described.get(name) for name in ("eviction", "compressed", "sparse"))
    return LayerOptions(
        codec=_rebuild_codec(described["codec"]),
        compressed=None if packed is None else CompressedOptions(**packed),
        sparse=None if sparse is None else _rebuild_sparse(sparse, described),
        eviction=None if eviction is None else _rebuild_eviction(eviction),
        latents=latents,
        config=config,
        **{name: described[name] for name in _SIZES},
    )


def _layer(index: str, about: list[Any], tensors: dict[str, torch.Tensor]) -> LayerProjection:
    def side(name: str) -> SideProjection:
        prefix = f"{BASES}{index}.{name}"
        return SideProjection(tensors[f"{prefix}.down"], tensors[f"{prefix}.up"], tensors.get(f"{prefix}.mean"))

    heads, before_rope, weights = about
    return LayerProjection(side("keys"), side("values"), heads, before_rope, weights)


def _codec(codec: Codec) -> dict[str, Any]:
    if isinstance(codec, MixedCodec):
        kinds = codec.all()
        return {
            "mixed": [_codec(kind) for kind in kinds],
            "layers": {index: kinds.index(of_layer) for index, of_layer in codec.layers.items()},
        }
    if isinstance(codec, LatentCodec):
        return {"latents": _codec(codec.latents), "rotary": None if codec.rotary is None else _codec(codec.rotary)}
    if codec.arguments is None or codec.name not in codec_names():
        raise ValueError(
            f"codec={codec!r} was not made by its name, so a file cannot describe it; accepted: codecs by name, or "
            "load the file with empty=<an empty cache with the same settings>"
        )
    return {"name": codec.name, "arguments": _plain(codec.arguments, f"codec {codec.name!r}")}


def _rebuild_codec(described: dict[str, Any]) -> Codec:
    if "mixed" in described:
        kinds = [_rebuild_codec(kind) for kind in described["mixed"]]
        return MixedCodec({int(index): kinds[number] for index, number in described["layers"].items()})
    if "latents" in described:
        rotary = described["rotary"]
        return LatentCodec(_rebuild_codec(described["latents"]), None if rotary is None else _rebuild_codec(rotary))
    return resolve_codec(described["name"], **described["arguments"])


def _policy(policy: Policy) -> dict[str, Any]:
    """The name of a policy, and its options by the attributes that have their names."""
    name = policy.name
    options: dict[str, Any] = {}
    inner: Policy = policy
    while True:
        own = [n for n in inspect.signature(type(inner)).parameters if n != "policy"] if _has_options(inner) else []
        options |= {n: getattr(inner, n) for n in own}
        if not isinstance(inner, Wrapper):
            break
        inner = inner.policy
        name = f"{name}-{inner.name}"
    return {"name": name, "options": _plain(options, f"policy {name!r}")}


def _has_options(policy: Policy) -> bool:
    return type(policy).__init__ is not object.__init__


def _rebuild_eviction(described: dict[str, Any]) -> EvictionOptions:
    mask, span = described["pin_mask"], described["pinned"]
    pin: Any = tuple(span) if span is not None else None
    if mask is not None:
        pin = torch.from_numpy(np.array(mask, dtype=bool))
    policy = described["policy"]
    return EvictionOptions(
        policy=resolve_policy(policy["name"], **policy["options"]),
        budget=Budget(*described["budget"]),
        pins=Pins(pin),
        **{name: described[name] for name in _EVICTION},
    )


def _sparse(sparse: SparseOptions) -> dict[str, Any]:
    """The settings of sparse reading; the anchors of a selector are a list of numbers."""
    selector = sparse.selector
    if type(selector) is not selectors().get(selector.name):
        raise ValueError(
            f"selector={selector!r} is not registered, so a file cannot describe it; accepted: registered selectors, "
            "or load the file with empty=<an empty cache with the same settings>"
        )
    options = selector.settings()
    numbers = {name: list(value) for name, value in options.items() if isinstance(value, tuple)}
    plain = _plain({n: v for n, v in options.items() if n not in numbers}, f"selector {selector.name!r}")
    return {
        "selector": selector.name,
        "options": plain | numbers,
        "budget": sparse.budget.amount,
        "taper": sparse.budget.taper,
        "dense_layers": sparse.dense_layers,
    }


def _rebuild_sparse(described: dict[str, Any], sizes: dict[str, Any]) -> SparseOptions:
    sinks, tail, page = (sizes[name] for name in ("sink_length", "tail_length", "page_size"))
    budget = ReadBudget(described["budget"], sinks, tail, page, described.get("taper", 0.0))
    selector = resolve_selector(described["selector"], **described["options"])
    return SparseOptions(selector, budget, described["dense_layers"])


def _plain(arguments: dict[str, Any], of: str) -> dict[str, Any]:
    for name, value in arguments.items():
        if not (value is None or isinstance(value, bool | int | float | str)):
            raise ValueError(
                f"{of} has {name}={value!r}, which a file cannot describe; accepted: numbers and strings, or load the "
                "file with empty=<an empty cache with the same settings>"
            )
    return arguments
