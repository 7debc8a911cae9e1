"""LagKV: tokens whose channels stand out against the block that follows (arXiv:2504.04704)."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.registry import register
from hf_kvcache.utils.validation import flag, whole

#: Of tokens that are not judged: far above any judged one, yet finite, since others may multiply scores.
_NOT_JUDGED = 1e6
#: The range of fewer tokens says little.
_SHORTEST = 8


@register("lagkv")
class LagKV(Policy):
    """Keys and values of a block, normalized by the minimum and maximum of each channel in the next block.

    A token's score is the standard deviation over channels, softmax within the block, averaged over keys and values.
    Sinks and the newest tokens, whose block has no full one after it, are not judged and come first. They are fewer
    than two blocks; where that would be more than half of what a head keeps, blocks are shorter, so that not all of the
    budget goes to the newest.

    Args:
        lag: tokens of a block; more than 8 of them are cut to a quarter of what a head keeps beside the sinks.
        sinks: oldest tokens, before the first block.
        across: let blocks compete by these scores; otherwise tokens are ranked within their block, so that every block
            loses the same share, as in the paper.

    Raises:
        ValueError: if ``lag`` is below 1, ``sinks`` below 0, or ``across`` not a bool.
    """

    def __init__(self, lag: int = 128, sinks: int = 4, across: bool = False) -> None:
        self.lag, self.sinks = whole("lag", lag), whole("sinks", sinks, least=0)
        self.across = flag("across", across)

    def score(self, ctx: Context) -> torch.Tensor:
        batch, heads, tokens, _ = ctx.keys.shape
        scores = torch.full((batch, heads, tokens), _NOT_JUDGED, dtype=torch.float32, device=ctx.keys.device)
        lag = min(self.lag, max((ctx.quota - self.sinks) // 4, _SHORTEST))
        judged = max(0, (tokens - self.sinks) // lag - 1)
        if judged == 0:
            return scores
        blocks = (self._stand_out(ctx.keys, lag, judged) + self._stand_out(ctx.values, lag, judged)) / 2
        if not self.across:
            blocks = (blocks.argsort(dim=-1, stable=True).argsort(-1) + 1) / lag
        if ctx.held is not None:
            # The places ascend and those without a token come last, so the last place of the next block tells.
            follows = ctx.held[:, :, self.sinks + 2 * lag - 1 :: lag][:, :, :judged]
            blocks = blocks.masked_fill(~follows[..., None], _NOT_JUDGED)
        scores[:, :, self.sinks : self.sinks + judged * lag] = blocks.flatten(2)
        return scores

    def _stand_out(self, x: torch.Tensor, lag: int, judged: int) -> torch.Tensor:
        """``[B, Hkv, judged, lag]`` of ``x [B, Hkv, T, D]``, the first ``judged`` blocks after the sinks."""
        blocks = x[:, :, self.sinks : self.sinks + (judged + 1) * lag].unflatten(2, (judged + 1, lag))
        low, high = blocks[:, :, 1:].amin(3, keepdim=True), blocks[:, :, 1:].amax(3, keepdim=True)
        # A channel that is constant in the next block (few bits can make it so) says nothing about its scale.
        constant = high == low
        scaled = ((blocks[:, :, :-1] - low) / (high - low).masked_fill(constant, 1.0)).masked_fill(constant, 0.0)
        return scaled.std(-1).softmax(-1)
