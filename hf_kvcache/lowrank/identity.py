"""Telling whether a model is the one that was calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_kvcache.integration.recording import fingerprint

#: What models call the projection of keys, alone or with those of queries and values.
_NAMES = ("k_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv")
#: Numbers of a weight that are kept.
_SAMPLES = 64
#: Share by which they may differ: 4 bits round by less, another training changes far more.
_MOST_APART = 0.2


def identity(config: Any) -> dict[str, Any]:
    """What a config says of the keys and values that a model caches."""
    text: Any = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    return {
        **fingerprint(config),
        "key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
    }


def weights_sketch(model: torch.nn.Module) -> dict[int, list[float]]:
    """Some numbers of the first and of the last attention layer's weights, by the layer's index.

    Not a hash, since the same weights are rounded otherwise in another dtype or file format. Without the layers whose
    weights are not at hand: quantized, or offloaded to a disk.
    """
    config: Any = getattr(model, "config", None)
    text = None if config is None else config.get_text_config(decoder=True)
    found: dict[int, torch.Tensor] = {}
    for module in model.modules():
        index, weight = getattr(module, "layer_idx", None), _key_weight(module)
        # Other modules with layers of attention see images or sounds.
        if isinstance(index, int) and weight is not None and getattr(module, "config", None) is text:
            found[index] = weight
    ends = {min(found), max(found)} if found else set()
    return {index: _some_of(found[index]) for index in sorted(ends) if _at_hand(found[index])}


def check_weights(module: torch.nn.Module, layer: int, sketch: Sequence[float]) -> None:
    """Raise ValueError where the weights of an attention module are not those that ``sketch`` was taken of.

    Weights that are not at hand pass, and those that differ by no more than rounding to some bits makes them.
    """
    weight = _key_weight(module)
    if weight is None or not _at_hand(weight):
        return
    known, own = torch.tensor(sketch), torch.tensor(_some_of(weight))
    if known.shape != own.shape:
        apart = 1.0
    else:
        apart = float((own - known).norm() / known.norm().clamp_min(torch.finfo().tiny))
    if apart > _MOST_APART:
        raise ValueError(
            f"the projection was made with other weights: those of the keys in layer {layer} differ by {apart:.0%}; "
            "accepted: a file calibrated on the model that runs"
        )


def _key_weight(module: torch.nn.Module) -> torch.Tensor | None:
    weights = (getattr(getattr(module, name, None), "weight", None) for name in _NAMES)
    return next((weight for weight in weights if isinstance(weight, torch.Tensor) and weight.dim() == 2), None)


def _at_hand(weight: torch.Tensor) -> bool:
    return not weight.is_meta and weight.is_floating_point()


def _some_of(weight: torch.Tensor) -> list[float]:
    """Numbers at equal distances, all over the weight."""
    flat = weight.detach().flatten()
    places = torch.linspace(0, len(flat) - 1, min(_SAMPLES, len(flat)), dtype=torch.float64).long()
    return flat[places.to(flat.device)].float().tolist()
