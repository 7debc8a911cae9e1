"""Attention over what a layer holds: few queries are a matter of reading memory, many a matter of arithmetic."""

from __future__ import annotations

from typing import Any

import torch

from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.reference import decode as reference
from hf_kvcache.kernels.visibility import Visibility

#: Query tokens up to which it is a decoding step: one, a draft to verify, a small chunk.
MOST_DECODED_QUERIES = 16


def attend(
    query: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    sums: bool = False,
) -> Attention:
    """Attention of new queries, by the twin for their number and device.

    :func:`hf_kvcache.kernels.reference.decode.attend` tells what it takes and gives. A twin says with ``supports`` what
    it can do; the reference does the rest (masks that say more than causality, windows and padding). None of them has a
    gradient: asking for it raises RuntimeError.
    """
    faster = implementation("decode" if query.shape[2] <= MOST_DECODED_QUERIES else "extend", query.device)
    use = faster if faster is not None and faster.supports(query, pages, dense, visibility) else reference
    return without_gradient(query, use.attend(query.detach(), pages, dense, visibility, scoring, sums))


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
    """Hands an output on; going backwards through it is an error, not a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise RuntimeError(NO_GRADIENT)
