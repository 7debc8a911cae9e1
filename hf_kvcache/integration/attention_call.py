"""The arguments of one call of the attention function, as the layers of a cache use them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_kvcache.integration.picks import Picked
from hf_kvcache.kernels.inputs import Scoring


@dataclass(slots=True)
class AttentionCall:
    """The queries of an update, and how they attend.

    Attributes:
        query: the queries ``[B, Hq, q, Dk]``, not scaled; None if only their number is known.
        mask: boolean or additive ``[B, 1 or Hq, q, tokens]``, 2D ``[B, tokens]``, or None.
        scoring: how scores are computed: scaling, soft-capping, sink logits.
        causal: whether later tokens are hidden where the mask does not decide it.
        module: the attention module; None if it is not known.
        length: number of queries, used if ``query`` is None.
        picked: the tokens that an indexer picked for each query, if only these are to be read. Then ``mask`` hides what
            is hidden beside that, and is None if nothing is.
    """

    query: torch.Tensor | None
    mask: torch.Tensor | None
    scoring: Scoring
    causal: bool = True
    module: torch.nn.Module | None = None
    length: int = 0
    picked: Picked | None = None

    @property
    def queries(self) -> torch.Tensor:
        """The queries, where they must be known because attention is computed."""
        assert self.query is not None
        return self.query

    @property
    def count(self) -> int:
        """Number of queries."""
        return self.length if self.query is None else self.query.shape[2]
