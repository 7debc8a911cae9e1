"""Keeping the cache's own code, which is Python over packed memory, out of ``torch.compile``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.compiler import is_dynamo_compiling

P = ParamSpec("P")
T = TypeVar("T")


def outside_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, which breaks the graph of a compiled model and is not compiled itself.

    ``torch.compiler.disable`` alone would cost a microsecond at every call of eager code. Functions that are called
    once a layer and token ask ``is_dynamo_compiling`` themselves, which costs less still.
    """
    disabled = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if is_dynamo_compiling():
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return call
