"""Compactor: attention inside chunks of the prompt, and keys unlike the others (arXiv:2507.08143)."""

from __future__ import annotations

import math

import torch

from hf_kvcache.eviction.attended import pool_mean
from hf_kvcache.eviction.base import ALL_QUERIES, Policy
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.factors import lower_factor
from hf_kvcache.eviction.registry import register
from hf_kvcache.utils.validation import between, flag, odd, whole

#: Share of the mean squared key (and of the mean leverage) below which differences are rounding.
_ROUNDING = 1e-6
_SMALLEST_DEVIATION = 1e-3
#: Added to scores where there is no key: finite, so that a chunk without any has no NaN.
_NO_KEY = -1e30


@register("compactor")
class Compactor(Policy):
    """Attention in chunks, whoever came first, times ``||v||``, plus the statistical leverage of un-rotated keys.

    Both are brought to mean 0 and deviation 1 over the layer's tokens before they are added. The leverage of a token is
    ``x (X'X)^-1 x'`` with the centered keys ``X``, in a random projection.

    Tokens that stay in any case are left out of all of this. A sink would take most of the attention of its chunk, and
    the deviation would be its own.

    Attention needs queries, and there are those of the latest update only. Tokens that have stayed from before are in
    no chunk: they are ranked by their leverage alone, among all tokens and stretched to the deviation that the sum of
    both parts has where the two are independent. So a prompt that is evicted chunk by chunk is judged on less than one
    that is evicted at its end.

    Args:
        chunk: tokens that attend to each other.
        kernel: neighboring tokens over which the attention part is averaged, odd.
        sketch: dimensions of the random projection.
        exact: leverage without a projection.
        weight: of the leverage; None for the share of the tokens that goes.
        scaled: whether scores are scaled as the model does; without, attention is sharper, and found more needles.

    Raises:
        ValueError: if ``chunk`` or ``sketch`` is below 1, ``kernel`` not odd, or ``weight`` negative.
    """

    observed = ALL_QUERIES
    needs_rope = True

    def __init__(
        self,
        chunk: int = 256,
        kernel: int = 3,
        sketch: int = 48,
        exact: bool = False,
        weight: float | None = None,
        scaled: bool = False,
    ) -> None:
        self.chunk, self.kernel, self.sketch = whole("chunk", chunk), odd("kernel", kernel), whole("sketch", sketch)
        self.exact, self.scaled = flag("exact", exact), flag("scaled", scaled)
        self.weight = None if weight is None else between("weight", weight, 0, float("inf"))

    def score(self, ctx: Context) -> torch.Tensor:
        held = torch.ones_like(ctx.protected) if ctx.held is None else ctx.held
        free = held & ~ctx.protected
        leverage = _standard(self._leverage(ctx, free), free)
        attention, observed = self._attention(ctx)
        attention = _standard(pool_mean(attention, observed, self.kernel), observed)
        weight = self._weight(ctx, held)
        return torch.where(observed, attention + weight * leverage, (1 + weight**2).sqrt() * leverage)

    def _weight(self, ctx: Context, held: torch.Tensor) -> torch.Tensor:
        """``[B, 1, 1]`` or a single number."""
        if self.weight is not None:
            return torch.tensor(float(self.weight), dtype=torch.float32, device="cpu")
        tokens = held.float().sum(-1).mean(-1).clamp_min(1)
        return (1 - ctx.quota / tokens).clamp_min(0)[:, None, None]

    def _leverage(self, ctx: Context, counted: torch.Tensor) -> torch.Tensor:
        """``[B, Hkv, T]``; sums to the number of dimensions over the tokens of a head that are counted."""
        assert ctx.rope is not None
        present = counted[..., None]
        keys = ctx.rope.unrotate(ctx.keys, ctx.positions) * present
        keys = (keys - keys.sum(2, keepdim=True) / present.sum(2, keepdim=True).clamp_min(1)) * present
        if not self.exact and self.sketch < keys.shape[-1]:
            projection = torch.randn(
                keys.shape[-1], self.sketch, generator=ctx.generator(), dtype=torch.float32, device="cpu"
            )
            keys = keys @ projection.to(keys.device, non_blocking=True) / math.sqrt(self.sketch)
        keys = keys.double()
        gram = keys.mT @ keys
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        # With fewer tokens than dimensions, or keys that are all alike, the matrix has no inverse.
        diagonal += _ROUNDING * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.float64).tiny
        lower = lower_factor(gram)
        return torch.linalg.solve_triangular(lower, keys.mT, upper=False).square().sum(-2).float()

    def _attention(self, ctx: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """What each token receives inside its chunk times the length of its value, and which tokens are in one.

        Protected tokens are in none.
        """
        assert ctx.queries is not None and ctx.query_positions is not None
        batch, heads, tokens, dim = ctx.keys.shape
        at = ctx.query_positions.expand(batch, -1)[:, None].expand(-1, heads, -1).contiguous()
        place = torch.searchsorted(ctx.positions.contiguous(), at).clamp_max(tokens - 1)
        there = (ctx.positions.gather(-1, place) == at) & ~ctx.protected.gather(-1, place)
        keys = ctx.keys.gather(2, place[..., None].expand(-1, -1, -1, dim))
        queries = ctx.queries.float().unflatten(1, (heads, -1)) * (ctx.scoring.inner if self.scaled else 1.0)
        # What is added to scores: the bias of keys that stand for others, and much below zero without a key.
        bias = torch.zeros_like(there, dtype=torch.float32) if ctx.bias is None else ctx.bias.gather(-1, place)
        added = bias.masked_fill(~there, _NO_KEY)
        parts = zip(*(x.split(self.chunk, dim=-1) for x in (queries.mT, keys.mT, added)), strict=True)
        received = torch.cat([self._received(q.mT, k, a, ctx.scoring.softcap) for q, k, a in parts], dim=-1)
        total = torch.zeros(batch, heads, tokens, dtype=torch.float32, device=keys.device).scatter_add_(
            -1, place, received * there
        )
        observed = torch.zeros_like(total).scatter_add_(-1, place, there.to(total.dtype)) > 0
        return total * ctx.values.norm(dim=-1), observed

    def _received(
        self, queries: torch.Tensor, keys: torch.Tensor, added: torch.Tensor, softcap: float | None
    ) -> torch.Tensor:
        """Attention ``[B, Hkv, c]`` that keys ``[B, Hkv, D, c]`` get from queries ``[B, Hkv, g, c, D]`` in all."""
        scores = queries @ keys[:, :, None]
        if softcap is not None and self.scaled:
            scores = softcap * scores.tanh()
        return (scores + added[:, :, None, None]).softmax(-1).sum(3).mean(2)


def _standard(x: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """``x [B, Hkv, T]`` with mean 0 and deviation 1 over the counted tokens of all heads of a sequence."""
    weights = counted / counted.sum((1, 2), keepdim=True).clamp_min(1)
    mean = (x * weights).sum((1, 2), keepdim=True)
    deviation = ((x - mean).square() * weights).sum((1, 2), keepdim=True).sqrt()
    smallest = (_SMALLEST_DEVIATION * mean.abs()).clamp_min(torch.finfo(x.dtype).tiny)
    return (x - mean) / deviation.maximum(smallest)
