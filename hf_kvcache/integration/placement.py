"""Where the weights of a model are: on one device or several, offloaded by accelerate, shared by several processes.

A weight that accelerate offloads lies on the meta device, without a value, but while its module runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def hooks_of(module: torch.nn.Module) -> tuple[Any, ...]:
    """The hooks of accelerate on a module."""
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def keeps_weights(module: torch.nn.Module) -> bool:
    """Whether the hooks on a module only move inputs to its device, as they do for a device map, or there are none."""
    return all(getattr(hook, "offload", None) is False for hook in hooks_of(module))


def runs_on(module: torch.nn.Module) -> torch.device:
    """The device that a module computes on: where its first weight is, or where that is moved when the module runs.

    It is the meta device only if nothing moves the weights.
    """
    weight = next((x for x in module.parameters() if x.is_floating_point()), None)
    if weight is not None and not weight.is_meta:
        return weight.device
    for part in module.modules():
        for hook in hooks_of(part):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return torch.device("cpu") if weight is None else weight.device


def reads_on(model: Any) -> torch.device:
    """The device that a model takes token ids on."""
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # transformers does not find those of every family
        embeddings = None
    return model.device if embeddings is None else runs_on(embeddings)


def only_device(model: Any) -> torch.device | None:
    """The device that all layers of a model run on; None if a device map names several."""
    several = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
    return None if several else reads_on(model)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that several processes share."""
    to_local: Any = getattr(tensor, "to_local", None)  # torch.distributed need not be there
    return tensor if to_local is None else to_local()


def refuse_tensor_parallel(model: Any, what: str) -> None:
    """Raise ValueError if each process has some of a model's heads, where ``what`` needs all of them."""
    processes = getattr(model, "tp_size", None) or 1
    if processes > 1:
        raise ValueError(
            f"{what} with a {type(model).__name__} that {processes} processes share by tensor parallelism: each has "
            "some of the heads; accepted: a model that is loaded without a tp_plan"
        )


def value_of(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
    """The value of a parameter or buffer of ``model``, from where accelerate keeps it; None if there is none."""
    if not tensor.is_meta:
        return tensor
    parts = name.split(".")
    for above in reversed(range(len(parts))):
        for hook in hooks_of(model.get_submodule(".".join(parts[:above]))):
            values = getattr(hook, "weights_map", None)
            if values is not None and ".".join(parts[above:]) in values:
                return values[".".join(parts[above:])]
    return None


def saved_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and the buffers that are saved with them, where quantized models have their weights."""
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer
