"""ChunkKV: tokens that stand side by side stay or go together (arXiv:2502.00299)."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.registry import register
from hf_kvcache.eviction.wrapper import Wrapper
from hf_kvcache.utils.validation import whole


@register("chunk", wraps=True)
class Chunk(Wrapper):
    """Every token gets the mean score of its chunk, so that the chunks with the best mean stay.

    Chunks are cut by original positions, so that the same tokens stand together at every eviction. The mean is over
    the tokens of a chunk that are held and free to go; what is protected stays anyway. Of the chunk that fills the
    budget, the newest tokens stay.

    Args:
        policy: the policy that gives the scores.
        length: positions in a chunk; 1 changes nothing.

    Raises:
        ValueError: if ``length`` is below 1.
    """

    def __init__(self, policy: Policy, length: int = 16) -> None:
        super().__init__(policy)
        self.length = whole("length", length)

    def score(self, ctx: Context) -> torch.Tensor:
        scores = self.policy.score(ctx)
        chunk = ctx.positions // self.length
        # Positions ascend. The chunks of a head are numbered as they come, for how many there are nobody has to know.
        new = torch.nn.functional.pad(chunk[..., 1:] != chunk[..., :-1], (1, 0))
        index = new.cumsum(-1)
        counted = ~ctx.protected if ctx.held is None else ctx.held & ~ctx.protected
        # In float64, where the sum of the largest float32 scores is finite.
        exact = scores.double().masked_fill(~counted, 0.0)
        total = torch.zeros_like(exact).scatter_add_(-1, index, exact)
        count = torch.zeros_like(exact).scatter_add_(-1, index, counted.double())
        mean = (total / count.clamp_min(1)).gather(-1, index)
        return torch.where(counted, mean.to(scores.dtype), scores)
