"""Expected Attention: what the queries to come will attend to, from how queries are distributed (arXiv:2510.00636)."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.base import ALL_QUERIES, Policy
from hf_kvcache.eviction.context import Context, Rope
from hf_kvcache.eviction.registry import register
from hf_kvcache.utils.validation import between, flag, whole

#: Probabilities are taken relative to those of other tokens and may exceed 1, but not float32.
_LARGEST_LOGARITHM = 60.0


@register("expected")
class ExpectedAttention(Policy):
    """``(softmax(k . mean + k . covariance . k / 2) + epsilon) * ||v||``, averaged over the query heads of a group.

    Mean and covariance are those of the queries before rotary positions, turned by the average of the rotations to the
    next positions: the expected exponential score of a key if queries are normally distributed. Soft-capping and sink
    logits play no part.

    Args:
        future: next positions over which the rotation is averaged.
        window: latest queries that are taken for typical; None for all of the latest update.
        sinks: first positions, which are like no others: their queries are left out of the mean and covariance, and
            what their keys draw out of the softmax's sum.
        epsilon: added to the probability, so that a value's length counts for a token without attention too.
        use_covariance: whether the covariance is counted.
        use_values: whether the probability is multiplied by the length of the value.

    Raises:
        ValueError: if ``future`` or ``window`` is below 1, or ``sinks`` or ``epsilon`` negative.
    """

    needs_rope = True

    def __init__(
        self,
        future: int = 512,
        window: int | None = None,
        sinks: int = 4,
        epsilon: float = 1e-2,
        use_covariance: bool = True,
        use_values: bool = True,
    ) -> None:
        self.future, self.sinks = whole("future", future), whole("sinks", sinks, 0)
        self.window = None if window is None else whole("window", window)
        self.epsilon = between("epsilon", epsilon, 0, float("inf"))
        self.use_covariance, self.use_values = flag("use_covariance", use_covariance), flag("use_values", use_values)

    @property
    def observed(self) -> int:  # type: ignore[override]
        return ALL_QUERIES if self.window is None else self.window

    def score(self, ctx: Context) -> torch.Tensor:
        mean, covariance = self._future_queries(ctx)
        total = torch.zeros(ctx.keys.shape[:3], dtype=torch.float32, device=ctx.keys.device)
        # One query head of each group at a time: keys times covariance is as large as the keys.
        for of_mean, of_covariance in zip(mean.unbind(2), covariance.unbind(2), strict=True):
            logits = (ctx.keys @ of_mean[..., None]).squeeze(-1)
            if self.use_covariance:
                logits += ((ctx.keys @ of_covariance) * ctx.keys).sum(-1) / 2
            total += self._probabilities(logits, ctx)
        scores = total / mean.shape[2]
        return (scores + self.epsilon) * ctx.values.norm(dim=-1) if self.use_values else scores

    def _future_queries(self, ctx: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean ``[B, Hkv, g, D]`` and covariance ``[B, Hkv, g, D, D]``, the factors of the scores included."""
        assert ctx.queries is not None and ctx.query_positions is not None and ctx.rope is not None
        at = ctx.query_positions.expand(ctx.queries.shape[0], -1)
        queries = ctx.rope.unrotate(ctx.queries, at[:, None]) * ctx.scoring.scaling
        typical = at >= self.sinks
        typical = typical | ~typical.any(-1, keepdim=True)
        weights = (typical / typical.sum(-1, keepdim=True)).to(queries.dtype)[:, None, :, None]
        mean = (queries * weights).sum(2)
        apart = queries - mean[:, :, None]
        covariance = apart.transpose(-1, -2) @ (apart * weights)
        turn = _average_rotation(ctx.rope, ctx.seen, self.future, queries.shape[-1], queries.device)
        mean, covariance = mean @ turn, turn.T @ covariance @ turn
        heads = ctx.keys.shape[1]
        return mean.unflatten(1, (heads, -1)), covariance.unflatten(1, (heads, -1))

    def _probabilities(self, logits: torch.Tensor, ctx: Context) -> torch.Tensor:
        """``exp(logits)`` ``[B, Hkv, T]`` over their sum without the first positions."""
        counted = ctx.positions >= self.sinks
        if ctx.bias is not None:
            logits = logits + ctx.bias
        if ctx.held is not None:
            logits = logits.masked_fill(~ctx.held, -torch.inf)
            counted = counted & ctx.held
        counted = counted | ~counted.any(-1, keepdim=True)
        total = logits.masked_fill(~counted, -torch.inf).logsumexp(-1, keepdim=True)
        return (logits - total.clamp_min(torch.finfo(logits.dtype).min)).clamp_max(_LARGEST_LOGARITHM).exp()


def _average_rotation(rope: Rope, start: int, count: int, dim: int, device: torch.device) -> torch.Tensor:
    """``[D, D]``: row ``i`` is the ``i``-th unit vector, rotated to each of ``count`` positions and averaged."""
    units = rope.pairs(torch.eye(dim, dtype=torch.float32, device=device))
    # A vector whose pairs are all 1: what becomes of its pairs is what every pair is multiplied by.
    ones = units.real.sum(-1).expand(count, dim)
    factors = rope.pairs(rope.rotate(ones, torch.arange(start, start + count, device=device))).mean(0)
    return ((units * factors) @ units.mH).real
