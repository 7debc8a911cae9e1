"""``torch.compile``: which code of the cache is part of graphs, and which is kept out of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch.compiler import is_dynamo_compiling

from hf_kvcache.kernels.inputs import Scoring

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


class TracesAttention(Protocol):
    """A layer whose attention can be part of a graph."""

    def trace_attend(
        self, states: TracedStates, query: torch.Tensor, mask: torch.Tensor | None, causal: bool, scoring: Scoring
    ) -> torch.Tensor:
        """Attention ``[B, T, Hq, Dv]`` of the queries of ``states``, which stores their tokens."""


class TracedStates:
    """What ``update`` returns while a model is compiled, if the layer's attention can be part of the graph.

    Only the attention function of this package can use it. It is no tensor: any other use is an error while the model
    is being compiled, and no wrong result later.

    Args:
        layer: the layer.
        keys: of the new tokens, ``[B, Hkv, T, Dk]``.
        values: of the new tokens, ``[B, Hkv, T, Dv]``.
        final: the state of the layer that a forward pass comes to last.
    """

    def __init__(self, layer: TracesAttention, keys: torch.Tensor, values: torch.Tensor, final: torch.Tensor) -> None:
        self.layer, self.keys, self.values, self.final = layer, keys, values, final
        self.dtype, self.device = keys.dtype, keys.device
