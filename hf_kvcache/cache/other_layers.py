"""Layers of transformers' own in a cache of ours (states of recurrences and convolutions, chunked attention), saved.

They are taken apart by their attributes, whatever release they come from: tensors, tensors by number, plain values.
"""

from __future__ import annotations

from typing import Any

import torch

#: Attributes that say where tensors lie and of what dtype they are, which follows from the tensors.
_FOLLOWS = ("device", "dtype")


def tensors(index: int, layer: Any) -> dict[str, torch.Tensor]:
    """The tensors that layer ``index`` holds, by name; raises ValueError for what cannot be saved."""
    found: dict[str, torch.Tensor] = {}
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor):
            found[name] = value.clone()
        elif isinstance(value, dict) and any(isinstance(part, torch.Tensor) for part in value.values()):
            found |= {f"{name}.{key}": part.clone() for key, part in value.items() if part is not None}
        elif not _is_plain(value) and name not in _FOLLOWS:
            raise ValueError(
                f"layer {index} is a {type(layer).__name__} of transformers' own and holds {name}={value!r}, which "
                "cannot be saved; accepted: tensors, numbers and names"
            )
    return found


def plain(layer: Any) -> dict[str, Any]:
    """All else that the layer is, as JSON has it."""
    return {
        name: {str(key): part for key, part in value.items()} if isinstance(value, dict) else value
        for name, value in vars(layer).items()
        if name not in _FOLLOWS and _is_plain(value)
    }


def restore(layer: Any, saved: dict[str, torch.Tensor], values: dict[str, Any], device: Any) -> None:
    """Make an empty ``layer`` hold what :func:`tensors` and :func:`plain` returned; ValueError if it cannot."""
    saved = {name: tensor.clone() if device is None else tensor.to(device) for name, tensor in saved.items()}
    known = set(vars(layer))
    named = {name.split(".")[0] for name in saved}
    if strange := sorted((named | set(values)) - known - {"kind"}):
        raise ValueError(f"{type(layer).__name__} has no {strange[0]!r}")
    for name, value in values.items():
        if name == "kind":
            continue
        own = getattr(layer, name)
        if isinstance(value, dict) != isinstance(own, dict):
            raise ValueError(f"{name!r} is {value!r}, in this cache {own!r}")
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
