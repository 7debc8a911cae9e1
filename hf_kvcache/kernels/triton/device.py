"""Launches on the device of the tensors. Triton launches on the current device, but a model may use several GPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def on_their_device(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, with the device of its first tensor as the current one while it runs."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        device = next(argument.device for argument in args if isinstance(argument, torch.Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(*args, **kwargs)
        with torch.cuda.device(device):
            return function(*args, **kwargs)

    return call
