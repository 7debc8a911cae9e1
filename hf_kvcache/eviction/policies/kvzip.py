"""KVzip: what the model looks at when it repeats the context (arXiv:2505.23416)."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.registry import register


@register("kvzip")
class KVzip(Policy):
    """The largest probability that any query gave a token while the model read and repeated the context.

    For contexts that are read once and used for many questions: it costs about one more prefill. Heads compete over all
    layers, as in the paper: some need hardly anything, some nearly all.
    """

    needs_replay = True
    across_layers = True
    needs_states = False
    needs_values = False

    def score(self, ctx: Context) -> torch.Tensor:
        assert ctx.replayed is not None
        return ctx.replayed
