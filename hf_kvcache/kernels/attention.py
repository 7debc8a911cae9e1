"""Attention over the pages and the full-precision tokens of a layer, by the backend of their device.

For few queries the time is that of reading memory, for many that of arithmetic. So there are two operations: ``decode``
for few queries and ``extend`` for many.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.pack import decode_side
from hf_kvcache.kernels.reference import decode as reference
from hf_kvcache.kernels.visibility import Visibility

#: Query tokens up to which the operation is ``decode``: one token, a draft to verify, a small chunk.
MOST_DECODED_QUERIES = 16
#: The reference's attention over pages, with their sides decoded by the backend of their device.
read_pages = partial(reference.attend_pages, decode=decode_side)


def attend(
    query: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    sums: bool = False,
) -> Attention:
    """Attention of new queries.

    :func:`hf_kvcache.kernels.reference.decode.attend` says what the arguments and the result are. A backend's
    ``supports`` says which calls it can do. The reference does all others, such as those with a mask that says more
    than causality, windows and padding. No backend computes a gradient: asking for one raises RuntimeError.
    """
    faster = implementation("decode" if query.shape[2] <= MOST_DECODED_QUERIES else "extend", query.device)
    if faster is not None and faster.supports(query, pages, dense, visibility):
        result = faster.attend(query.detach(), pages, dense, visibility, scoring, sums)
    else:
        result = reference.attend(query.detach(), pages, dense, visibility, scoring, sums, read_pages)
    return without_gradient(query, result)


def without_gradient(query: torch.Tensor, result: Attention) -> Attention:
    """``result``, such that going backwards through it to ``query`` raises RuntimeError."""
    if query.requires_grad and torch.is_grad_enabled():
        return result._replace(output=refuse_gradient(result.output, query))
    return result


def refuse_gradient(output: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
    """``output``, such that going backwards through it to any of its ``sources`` raises RuntimeError."""
    return _NoGradient.apply(output, *sources) if sources else output


#: Why there is no gradient, and what to do.
NO_GRADIENT = (
    "attention over tokens that a KVCache held before has no gradient; only the first forward pass with an empty cache "
    "has one. Train without a cache, or pass the whole sequence at once with an empty one."
)


class _NoGradient(torch.autograd.Function):
    """Returns an output as it is. Its backward pass raises an error, where autograd would give a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise RuntimeError(NO_GRADIENT)
