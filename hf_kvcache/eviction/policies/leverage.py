"""Leverage: keys in directions that few other keys have, and their neighbors."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.attended import pool_mean
from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.factors import lower_factor
from hf_kvcache.eviction.registry import register
from hf_kvcache.utils.validation import between, odd


@register("leverage")
class Leverage(Policy):
    """The statistical leverage of un-rotated keys, averaged over neighboring tokens.

    The leverage of a token is ``x (X'X + ridge * m * I)^-1 x'`` with the centered keys ``X`` of its head and ``m`` the
    mean of the diagonal of ``X'X``: how little the other tokens say about its key. It needs no query, no attention and
    ``O(T * D^2)`` work a head. Compactor (arXiv:2507.08143) has it as one of two terms; alone, exact, and averaged over
    neighbors it finds what a text says once, and is no better than random tokens at the rest (the README's table).
    Rotary positions spread a direction over many, hence un-rotated; neighbors, because a rare word is of use only with
    the words around it.

    Args:
        kernel: tokens of the average, odd.
        ridge: what is added to the diagonal, as a share of its mean.

    Raises:
        ValueError: if ``kernel`` is not odd, or ``ridge`` outside 0 to 1.
    """

    needs_rope = True
    needs_values = False

    def __init__(self, kernel: int = 5, ridge: float = 0.01) -> None:
        self.kernel, self.ridge = odd("kernel", kernel), between("ridge", ridge, 1e-6, 1)

    def score(self, ctx: Context) -> torch.Tensor:
        assert ctx.rope is not None
        held = torch.ones_like(ctx.protected) if ctx.held is None else ctx.held
        return pool_mean(leverage(ctx.rope.unrotate(ctx.keys, ctx.positions), held, self.ridge), held, self.kernel)


def leverage(x: torch.Tensor, held: torch.Tensor, ridge: float) -> torch.Tensor:
    """The ridge leverage of the rows of ``x [B, Hkv, T, D]`` where ``held [B, Hkv, T]``, float32 ``[B, Hkv, T]``."""
    present = held[..., None]
    x = x.float() * present
    x = (x - x.sum(2, keepdim=True) / present.sum(2, keepdim=True).clamp_min(1)) * present
    gram = (x.mT @ x).double()
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    # With keys that are all alike the matrix would have no inverse.
    diagonal += ridge * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    lower = lower_factor(gram).float()
    return torch.linalg.solve_triangular(lower, x.mT, upper=False).square().sum(-2)
