"""Attention in float64, and how far a method may lie from it."""

from __future__ import annotations

import torch

#: Largest relative error ``|out - exact| / |exact|`` for random normal keys, values and queries, by what is stored.
#: About twice the usual error, to leave room for chance; what a kernel of ours adds to the codec's error has a tighter
#: bound, ``OWN_TOLERANCE``.
TOLERANCES = {
    "fp32": 2e-5,
    "bf16": 3e-2,
    "fp16": 4e-3,
    "fp8": 9e-2,
    "8": 2.5e-2,
    "4": 0.25,
    "3": 0.45,
    "2": 0.9,
}
#: The same for our attention against float64 attention over the very keys and values that the cache decodes to.
OWN_TOLERANCE = 5e-3


def attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention in float64 of the last tokens.

    Args:
        query: ``[B, Hq, n, D]``, the queries of the last ``n`` tokens.
        keys: ``[B, Hkv, T, D]``.
        values: ``[B, Hkv, T, D]``.

    Returns:
        ``[B, n, Hq, D]``, float64.
    """
    heads, new, tokens = keys.shape[1], query.shape[2], keys.shape[2]
    group = query.shape[1] // heads
    hidden = torch.ones(new, tokens, dtype=torch.bool, device=query.device).triu(tokens - new + 1)
    out = torch.empty(query.shape, dtype=torch.float64, device=query.device)
    # Head by head: float64 copies of a whole long cache would not fit beside it.
    for head in range(heads):
        rows = slice(head * group, (head + 1) * group)
        k, v = keys[:, head, None].double(), values[:, head, None].double()
        scores = query[:, rows].double() @ k.transpose(2, 3) * query.shape[3] ** -0.5
        out[:, rows] = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
    return out.transpose(1, 2)


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """``|out - exact| / |exact|`` over all elements."""
    return ((out.double() - exact.double()).norm() / exact.double().norm()).item()


def check(name: str, error: float, tolerance: float) -> float:
    """``error`` itself.

    Raises:
        AssertionError: unless it is below ``tolerance``.
    """
    if not error <= tolerance:
        raise AssertionError(f"{name}: relative error {error:.2e} against float64 attention, allowed {tolerance:.0e}")
    return error
