"""Saving and restoring transformers' own layers: recurrences, convolutions, chunked attention.

Their attributes are read by kind, so that the code works for the layers of any release: tensors, dictionaries of
tensors by number, and plain values (numbers, strings, booleans, None).
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

#: Attributes that are not saved, because they follow from the tensors.
_FROM_TENSORS = ("device", "dtype")


def tensors(index: int, layer: Any) -> dict[str, torch.Tensor]:
    """The tensors of layer ``index``, by name.

    Raises:
        ValueError: if an attribute of the layer is neither a tensor nor a plain value.
    """
    found: dict[str, torch.Tensor] = {}
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor):
            found[name] = value.clone()
        elif isinstance(value, dict) and any(isinstance(part, torch.Tensor) for part in value.values()):
            found |= {f"{name}.{key}": part.clone() for key, part in value.items() if part is not None}
        elif not _is_plain(value) and name not in _FROM_TENSORS:
            raise ValueError(
                f"layer {index} is a {type(layer).__name__} of transformers' own and holds {name}={value!r}, which "
                "cannot be saved; accepted: tensors, numbers, strings"
            )
    return found


@torch.inference_mode(False)
def copied(layer: Any) -> Any:
    """A copy of a layer, to which a model can write outside of inference mode too."""
    other = deepcopy(layer)
    for name, value in list(vars(other).items()):
        if isinstance(value, dict):
            setattr(other, name, {key: _normal(part) for key, part in value.items()})
        else:
            setattr(other, name, _normal(value))
    return other


def _normal(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value


def plain_values(layer: Any) -> dict[str, Any]:
    """The attributes of the layer that are no tensors, as values for JSON."""
    return {
        name: {str(key): part for key, part in value.items()} if isinstance(value, dict) else value
        for name, value in vars(layer).items()
        if name not in _FROM_TENSORS and _is_plain(value)
    }


def restore(
    layer: Any, saved: dict[str, torch.Tensor], values: dict[str, Any], device: Any, owned: bool = False
) -> None:
    """Fill an empty layer with saved content.

    Args:
        layer: the empty layer.
        saved: what :func:`tensors` returned.
        values: what :func:`plain_values` returned.
        device: where the tensors are to lie; None leaves them where they are.
        owned: whether nobody else has the tensors; then those that need not move are not copied.

    Raises:
        ValueError: if the layer has other attributes.
    """
    if not owned or device is not None:
        saved = {name: tensor.clone() if device is None else tensor.to(device) for name, tensor in saved.items()}
    known = set(vars(layer))
    named = {name.split(".")[0] for name in saved}
    if strange := sorted((named | set(values)) - known - {"kind"}):
        raise ValueError(f"{type(layer).__name__} has no attribute {strange[0]!r}; accepted: {sorted(known)}")
    for name, value in values.items():
        if name == "kind":
            continue
        own = getattr(layer, name)
        if isinstance(value, dict) != isinstance(own, dict):
            raise ValueError(f"{name}={value!r}; accepted: a value like {own!r}, which this cache has")
        setattr(layer, name, {int(key): part for key, part in value.items()} if isinstance(value, dict) else value)
    for name, tensor in saved.items():
        whole, _, key = name.partition(".")
        if key:
            getattr(layer, whole)[int(key)] = tensor
        else:
            setattr(layer, whole, tensor)
    states = [tensor for name, tensor in saved.items() if tensor.dim() > 0]
    if states:
        layer.device, layer.dtype = states[0].device, states[0].dtype


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(part) and not isinstance(part, dict) for part in value.values())
    return value is None or isinstance(value, bool | int | float | str)
