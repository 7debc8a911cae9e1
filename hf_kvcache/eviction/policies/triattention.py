"""TriAttention: how far back a head's typical query looks, as a trigonometric series (arXiv:2604.04921)."""

from __future__ import annotations

from pathlib import Path

import torch

from hf_kvcache.eviction.base import ALL_QUERIES, Policy
from hf_kvcache.eviction.calibration import LayerStatistics, QueryStatistics
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.registry import register
from hf_kvcache.utils.validation import one_of, whole

_SMALLEST_DEVIATION = 1e-6


@register("triattention")
class TriAttention(Policy):
    """The score that a head's mean query will give a key, averaged over future distances, plus a norm term.

    With the pairs ``q`` and ``k`` of the un-rotated queries and keys, for a key ``d`` positions back: the mean over the
    offsets of ``sum_f |E q_f| |k_f| cos((d + offset) w_f + arg(E q_f) - arg(k_f))``, plus
    ``sum_f (E |q_f| - |E q_f|) |k_f|``: what is left of queries that differ is counted by the key's length alone. The
    scores of a query head are brought to mean 0 and deviation 1 over the tokens that are free to go, then fused over
    the group.

    With a calibration it looks at no query. Without one, the queries of the latest update stand in for it: fine behind
    a long prompt, noise behind a few decoded tokens.

    Args:
        calibration: statistics of the model's queries, or the file they are in (:mod:`.calibration`); None for those of
            the latest update.
        offset: largest future distance; the offsets are the powers of two up to it.
        window: newest tokens that stay, though no more than half of what a head keeps.
        fuse: ``"max"`` for the query head of a group that wants a token most (the paper's), or ``"mean"``.

    Raises:
        ValueError: if ``offset`` or ``window`` is below 1, ``fuse`` is neither, or a file holds no calibration; when it
            is used, if the calibration is not of this model.
    """

    needs_values = False
    needs_rope = True

    def __init__(
        self,
        calibration: QueryStatistics | str | Path | None = None,
        offset: int = 65536,
        window: int = 128,
        fuse: str = "max",
    ) -> None:
        if isinstance(calibration, str | Path):
            calibration = QueryStatistics.load(calibration)
        elif not isinstance(calibration, QueryStatistics | None):
            raise ValueError(f"calibration={calibration!r}; accepted: QueryStatistics, the path of a file, None")
        self.calibration, self.fuse = calibration, one_of("fuse", fuse, ("max", "mean"))
        self.offset, self.window = whole("offset", offset), whole("window", window)

    @property
    def observed(self) -> int:  # type: ignore[override]
        return ALL_QUERIES if self.calibration is None else 0

    def recent(self, quota: int) -> int:
        return min(self.window, quota // 2)

    def score(self, ctx: Context) -> torch.Tensor:
        typical = self._statistics(ctx)
        center, spread = self._seen_from_the_future(typical, ctx)
        assert ctx.rope is not None
        pairs = ctx.rope.pairs(ctx.keys)
        scores = pairs.real @ center.real.mT + pairs.imag @ center.imag.mT + pairs.abs() @ spread.mT
        scores = _normalized(scores.mT, ctx)
        return scores.amax(2) if self.fuse == "max" else scores.mean(2)

    def _statistics(self, ctx: Context) -> LayerStatistics:
        """Mean pair and mean length, ``[B or 1, Hkv, g, F]``."""
        assert ctx.rope is not None
        heads = ctx.keys.shape[1]
        if self.calibration is not None:
            known = self.calibration.layer(ctx.layer, ctx.layers, heads, ctx.rope.frequencies)
            return known.apply(lambda x: x.to(ctx.keys.device).unflatten(0, (heads, -1))[None])
        assert ctx.queries is not None and ctx.query_positions is not None
        at = ctx.query_positions.expand(ctx.queries.shape[0], -1)
        pairs = ctx.rope.pairs(ctx.rope.unrotate(ctx.queries, at[:, None])).unflatten(1, (heads, -1))
        return LayerStatistics(pairs.mean(3), pairs.abs().mean(3), ctx.rope.frequencies)

    def _seen_from_the_future(self, typical: LayerStatistics, ctx: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean query, turned to the next position and averaged over the offsets, and the weight of keys' lengths.

        Turning the query on is the same as turning the key back, so that keys are taken as they are held.
        """
        assert ctx.rope is not None
        frequencies = ctx.rope.frequencies.double()
        offsets = 2 ** torch.arange(self.offset.bit_length(), dtype=torch.float64, device=frequencies.device)
        # In float64, where an angle of many turns keeps its fraction.
        turns = torch.exp(1j * (ctx.seen + offsets)[:, None] * frequencies).mean(0)
        length = ctx.rope.pairs(
            ctx.rope.rotate(
                torch.ones(1, ctx.keys.shape[-1], dtype=torch.float32, device="cpu"),
                torch.zeros(1, dtype=torch.float32, device="cpu").long(),
            )
        )[0].real
        turns = (turns * length).to(typical.mean.dtype).to(typical.mean.device, non_blocking=True)
        length = length.to(typical.length.device, non_blocking=True)
        return typical.mean * turns, (typical.length - typical.mean.abs()) * length.to(typical.length.dtype)


def _normalized(scores: torch.Tensor, ctx: Context) -> torch.Tensor:
    """``scores [B, Hkv, g, T]`` with mean 0 and deviation 1 over the tokens that are free to go."""
    free = ~ctx.protected if ctx.held is None else ctx.held & ~ctx.protected
    weights = (free / free.sum(-1, keepdim=True).clamp_min(1))[:, :, None]
    mean = (scores * weights).sum(-1, keepdim=True)
    deviation = ((scores - mean).square() * weights).sum(-1, keepdim=True).sqrt()
    return (scores - mean) / deviation.clamp_min(_SMALLEST_DEVIATION)
