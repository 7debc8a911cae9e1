"""KVzip: what the model looks at when it repeats the context (arXiv:2505.23416)."""

from __future__ import annotations

import torch

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.policies.critical import output_lengths
from hf_kvcache.eviction.registry import register
from hf_kvcache.utils.validation import flag


@register("kvzip")
class KVzip(Policy):
    """The largest probability that any query gave a token while the model read and repeated the context.

    For contexts that are read once and used for many questions: it costs about one more prefill. Heads compete over all
    layers, as in the paper: some need hardly anything, some nearly all.

    Args:
        normalized: whether the probability is multiplied by the L1 norm of ``W_O v``, averaged over the group's heads.
            KVzip+ does so query by query, over the length of the query's hidden state; here the length of the hidden
            state, which the keys' scores have in common but for which query it was, is left out.
    """

    needs_replay = True
    across_layers = True

    def __init__(self, normalized: bool = False) -> None:
        self.normalized = flag("normalized", normalized)

    @property
    def needs_values(self) -> bool:  # type: ignore[override]
        return self.normalized

    @property
    def needs_output(self) -> bool:  # type: ignore[override]
        return self.normalized

    def score(self, ctx: Context) -> torch.Tensor:
        assert ctx.replayed is not None
        return ctx.replayed * output_lengths(ctx) if self.normalized else ctx.replayed
