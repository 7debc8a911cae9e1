"""KVzip+: the largest part that a token had in a query's output while the context was repeated (arXiv:2601.07891)."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.output_lengths import output_lengths
from hf_kvcache.eviction.registry import register


@register("kvzipplus")
class KVzipPlus(Policy):
    """The largest ``p * ||W_O v|| / ||h||`` over the queries of a second reading and the query heads of a group.

    ``p`` is the probability that a query gave the token, ``W_O v`` the token's value behind the output projection of
    the query's head, and ``h`` the query's hidden state as its attention module was given it. As with ``kvzip``, heads
    compete over all layers, and it costs about one more prefill.
    """

    needs_replay = True
    replay_by_head = True
    across_layers = True
    needs_output = True

    def score(self, ctx: Context) -> torch.Tensor:
        assert ctx.replayed is not None
        return (ctx.replayed * output_lengths(ctx, 2)).amax(2)
