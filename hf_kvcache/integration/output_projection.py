"""The output projection of an attention module, for methods that weigh a value by its effect on the output."""

from __future__ import annotations

import torch

from hf_kvcache.integration.placement import local_part, runs_on, value_of

#: Names that models give the output projection.
_NAMES = ("o_proj", "dense", "out_proj", "wo", "Wo", "c_proj")


def output_weight(module: torch.nn.Module | None, value_dim: int) -> torch.Tensor:
    """The weight ``[hidden, Hq * Dv]`` of the projection behind the attention of ``module``, for this process's heads.

    Raises:
        ValueError: if the module is None, or has no output projection with a plain weight.
    """
    if module is not None:
        for name in _NAMES:
            weight = getattr(getattr(module, name, None), "weight", None)
            if isinstance(weight, torch.Tensor) and weight.is_meta:
                value = value_of(module, f"{name}.weight", weight)
                weight = weight if value is None else value.to(runs_on(module))  # offloaded
            if isinstance(weight, torch.Tensor) and weight.dim() == 2 and weight.is_floating_point():
                # transformers' Conv1D (GPT-2) stores its weight transposed.
                weight = weight.T if type(getattr(module, name)).__name__ == "Conv1D" else weight
                weight = local_part(weight)
                if weight.shape[1] % value_dim == 0:
                    return weight.detach()
    raise ValueError(
        f"{type(module).__name__} has no output projection with a plain weight; accepted: modules with one of "
        f"{', '.join(_NAMES)}, or a policy that needs none"
    )
