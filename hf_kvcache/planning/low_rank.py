"""Low-rank bases of the right shapes and without values: what a calibration will find, as far as bytes go."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from hf_kvcache.cache.base import KVCache
from hf_kvcache.codecs.registry import resolve as resolve_codec
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.lowrank.basis import LayerBasis, SideBasis
from hf_kvcache.lowrank.calibration import calibrate
from hf_kvcache.lowrank.methods import resolve as resolve_method
from hf_kvcache.lowrank.projection import LayerProjection, SideProjection
from hf_kvcache.lowrank.ranks import choose_ranks
from hf_kvcache.planning.caches import LowRank
from hf_kvcache.planning.model import LayerCall

#: The method that `hf-kvcache calibrate` takes if none is named.
METHOD: str = inspect.signature(calibrate).parameters["method"].default
#: What a plan without bases leaves open.
NOTE = (
    f"bases as method {METHOD!r} finds them, and the same rank in all layers; a calibration gives layers different "
    "ranks, as many together up to their rounding to multiples of 8"
)


def planned(config: PreTrainedConfig, wanted: LowRank, calls: list[tuple[LayerCall, ...]]) -> Callable[[], Cache]:
    """A function that makes caches of coefficients which can be filled on the ``meta`` device and not be read.

    Args:
        config: the config of the model's decoder.
        wanted: rank, codec, and the file of the bases.
        calls: what the model gives to each of its layers in a forward pass.

    Raises:
        ValueError: if the rank is out of range, the model caches no keys and values, or the file is of another model.
    """
    if wanted.file is None:
        stored = {"codec": "auto" if "bits" in wanted.stored else "none"} | wanted.stored
        layers, codec = _without_bases(config, wanted, calls), resolve_codec(**stored)
    else:
        made: Any = wanted(config)
        # Bytes do not depend on the rotary embedding, which blank keys have none of.
        layers = {index: replace(layer, before_rope=False) for index, layer in made.options.latents.items()}
        codec = made.codec
    return lambda: KVCache(config, codec, latents=layers)


def _without_bases(
    config: PreTrainedConfig, wanted: LowRank, calls: list[tuple[LayerCall, ...]]
) -> dict[int, LayerProjection]:
    bases = {}
    for index, (layer, of_layer) in enumerate(zip(KVCache(config, bind=False).layers, calls, strict=True)):
        # Subclasses hold something else: latents, the states of an image.
        if type(layer) is KVCacheLayer and [call.method for call in of_layer] == ["update"]:
            bases[index] = _basis(of_layer[0])
    if not bases:
        raise ValueError(f"lowrank: config of {config.model_type!r}; accepted: models that cache keys and values")
    ranks = choose_ranks(bases, wanted.rank, wanted.ratio, "uniform")
    return {
        index: LayerProjection(
            SideProjection.of(basis.keys, ranks[index].keys),
            SideProjection.of(basis.values, ranks[index].values),
            basis.heads,
        )
        for index, basis in bases.items()
    }


def _basis(update: LayerCall) -> LayerBasis:
    """All directions of the keys and values of one layer, without values."""
    keys, values = (state.sizes(1, 1) for state in update.arguments[:2])
    heads = keys[1]
    together = resolve_method(METHOD).group_size(heads)

    def side(width: int) -> SideBasis:
        square = torch.empty(heads // together, together * width, together * width, device="meta")
        return SideBasis(square, square, torch.zeros(square.shape[:2], device="cpu"))

    return LayerBasis(side(keys[3]), side(values[3]), heads, False, 0.0)
