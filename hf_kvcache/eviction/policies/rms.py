"""What the model looks at most when it repeats the context, on the whole (attention matching, arXiv:2602.16284)."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.registry import register


@register("rms")
class Rms(Policy):
    """The root mean square of the probability that a token got while the model repeated the context.

    It is used as ``kvzip``, and reads the context a second time too. ``kvzip`` takes the largest probability that any
    query gave, over all that it saw. Here the mean is over all queries, and each gives 1 to the context. Heads compete
    over all layers. It is made for attention matching (``compensate="match"``).
    """

    needs_replay = True
    replay_squares = True
    across_layers = True
    needs_states = False
    needs_values = False

    def score(self, ctx: Context) -> torch.Tensor:
        assert ctx.replayed is not None
        return ctx.replayed
