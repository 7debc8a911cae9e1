"""The attention of a window of queries, averaged and pooled over tokens: what several policies score by."""

from __future__ import annotations

import torch
from torch.nn.functional import avg_pool1d, max_pool1d

from hf_kvcache.eviction.context import Context


def mean_attention(ctx: Context) -> torch.Tensor:
    """Probability of each key, averaged over the queries, float32 ``[B, Hkv, g, T]``."""
    assert ctx.queries is not None
    return ctx.received() / ctx.queries.shape[2]


def before_queries(ctx: Context) -> torch.Tensor:
    """bool ``[B, Hkv, T]``, the tokens older than the first query; places without a token have later positions.

    The queries' own tokens see each other through a triangle, and so gain attention only for being near.
    """
    assert ctx.query_positions is not None
    first = ctx.query_positions[..., :1].view(-1, 1, 1)
    return ctx.positions < first


def pool_mean(x: torch.Tensor, counted: torch.Tensor, kernel: int) -> torch.Tensor:
    """Average over the ``kernel`` tokens around each, of those that are ``counted``; other tokens stay as they are.

    Args:
        x: float ``[B, Hkv, T]``.
        counted: bool, the same shape.
        kernel: an odd number.
    """
    weights = counted.to(x.dtype)
    pooled = avg_pool1d(x * weights, kernel, 1, kernel // 2)
    share = avg_pool1d(weights, kernel, 1, kernel // 2)
    return torch.where(counted, pooled / share.masked_fill(~counted, 1.0), x)


def pool_max(x: torch.Tensor, counted: torch.Tensor, kernel: int) -> torch.Tensor:
    """The largest of the ``kernel`` tokens around each, as :func:`pool_mean`."""
    pooled = max_pool1d(x.masked_fill(~counted, -torch.inf), kernel, 1, kernel // 2)
    return torch.where(counted, pooled, x)
