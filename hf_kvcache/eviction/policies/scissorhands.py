"""Scissorhands: tokens that were unimportant to most of the latest queries stay so (arXiv:2305.17118)."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.registry import register
from hf_kvcache.utils.validation import whole


@register("scissorhands")
class Scissorhands(Policy):
    """How often, over a window of queries, a token got less attention than an equal share; the most often go first.

    An equal share is one over the tokens that the query could see of those held. A token is judged by the queries that
    could see it, and newer tokens by fewer of them. The paper counts how often a token was unimportant, and so prefers
    a new token to any old one that was once overlooked; here it is the share of the judges that counts, which can be
    compared. The heads of a group are averaged.

    Args:
        window: latest queries that judge.
        newest: newest tokens that stay, for too few queries have judged them.

    Raises:
        ValueError: if ``window`` is below 1 or ``newest`` below 0.
    """

    needs_values = False

    def __init__(self, window: int = 400, newest: int = 10) -> None:
        self.window, self.newest = whole("window", window), whole("newest", newest, least=0)

    @property
    def observed(self) -> int:  # type: ignore[override]
        return self.window

    def recent(self, quota: int) -> int:
        return min(self.newest, quota)

    def score(self, ctx: Context) -> torch.Tensor:
        assert ctx.queries is not None and ctx.query_positions is not None
        batch, heads, tokens, _ = ctx.keys.shape
        at = ctx.query_positions.expand(batch, -1)[:, None].expand(-1, heads, -1).contiguous()
        positions = ctx.positions.contiguous()
        share = 1.0 / torch.searchsorted(positions, at, right=True)[:, :, None, :, None]
        important = torch.zeros(batch, heads, tokens, dtype=torch.int64, device=ctx.keys.device)
        start = 0
        for part in ctx.probabilities():
            stop = start + part.shape[3]
            important += (part >= share[:, :, :, start:stop]).sum((2, 3))
            start = stop
        judges = (at.shape[-1] - torch.searchsorted(at, positions)).clamp_min(1)
        return important / ctx.groups / judges - 1
