"""Telling whether a model is the one that something was measured on.

A config says of which kind a model is. Some of its weights say which model of that kind it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_kvcache.integration.layer_configs import of_layers
from hf_kvcache.integration.placement import local_part

#: Names that models give the projection of keys, alone or together with those of queries and values.
_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv")
#: Numbers of a weight that are kept.
_SAMPLES = 64
#: Largest relative difference between the samples of one model: rounding to 4 bits stays below, another training does
#: not.
_TOLERANCE = 0.2
#: What earlier files of query statistics do not say.
_NOT_IN_EARLIER_FILES = ("key_value_heads", "head_dim")


def model_identity(config: Any) -> dict[str, Any]:
    """What two models have in common if something that was measured on one can be used for the other.

    Where layers differ in their number of KV heads or in their width, there is a list of them.
    """
    text: Any = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    return {
        "model_type": text.model_type,
        "layers": text.num_hidden_layers,
        "heads": heads,
        "hidden_size": text.hidden_size,
        "rope": json.dumps(getattr(text, "rope_parameters", None), sort_keys=True, default=str),
        "key_value_heads": of_layers(text, "num_key_value_heads") or heads,
        "head_dim": of_layers(text, "head_dim") or text.hidden_size // heads,
    }


def check_identity(made: str, known: Mapping[str, Any], config: Any) -> None:
    """Raise ValueError unless a model with this ``config`` is like the one that something was made with.

    Args:
        made: what was made, for the error message.
        known: the :func:`model_identity` of the model that it was made with.
        config: the config of the model that is to use it.
    """
    for name, value in model_identity(config).items():
        if name not in known and name in _NOT_IN_EARLIER_FILES:
            continue
        if known.get(name) != value:
            raise ValueError(f"the {made} was made with {name}={known.get(name)!r}, this model has {value!r}")


def sample_weights(model: torch.nn.Module) -> dict[int, list[float]]:
    """Samples of the weights of the first and the last attention layer, by the layer's index.

    They are no hash, since the same weights are rounded differently in another dtype or file format. Layers whose
    weights are not loaded are left out: quantized weights, weights that are offloaded, and those of which this process
    has a part.
    """
    config: Any = getattr(model, "config", None)
    text = None if config is None else config.get_text_config(decoder=True)
    found: dict[int, torch.Tensor] = {}
    for module in model.modules():
        index, weight = getattr(module, "layer_idx", None), _key_weight(module)
        # Modules with another config belong to an encoder of images or sounds.
        if isinstance(index, int) and weight is not None and getattr(module, "config", None) is text:
            found[index] = weight
    ends = {min(found), max(found)} if found else set()
    return {index: _samples(found[index]) for index in sorted(ends) if _is_loaded(found[index])}


def check_weights(made: str, samples: Sequence[float], module: torch.nn.Module, layer: int) -> None:
    """Raise ValueError where the weights of an attention module are not those that ``samples`` were taken from.

    Weights that are not loaded pass. So do weights that differ by no more than rounding to a few bits makes them.

    Args:
        made: what was made with the other weights, for the error message.
        samples: of the layer, see :func:`sample_weights`.
        module: the attention module of the layer.
        layer: its index.
    """
    weight = _key_weight(module)
    if weight is None or not _is_loaded(weight):
        return
    known, own = (torch.tensor(x, dtype=torch.float32, device="cpu") for x in (samples, _samples(weight)))
    if known.shape != own.shape:
        difference = 1.0
    else:
        difference = float((own - known).norm() / known.norm().clamp_min(torch.finfo(torch.float32).tiny))
    if difference > _TOLERANCE:
        raise ValueError(
            f"the {made} was made with other weights: those of the keys in layer {layer} differ by {difference:.0%}; "
            "accepted: a file calibrated on the model that runs"
        )


def _key_weight(module: torch.nn.Module) -> torch.Tensor | None:
    weights = (getattr(getattr(module, name, None), "weight", None) for name in _KEY_PROJECTIONS)
    return next((weight for weight in weights if isinstance(weight, torch.Tensor) and weight.dim() == 2), None)


def _is_loaded(weight: torch.Tensor) -> bool:
    return not weight.is_meta and weight.is_floating_point() and local_part(weight) is weight


def _samples(weight: torch.Tensor) -> list[float]:
    """Numbers at equal distances, all over the weight."""
    flat = weight.detach().flatten()
    places = torch.linspace(0, len(flat) - 1, min(_SAMPLES, len(flat)), dtype=torch.float64, device="cpu").long()
    return flat[places.to(flat.device)].float().tolist()
