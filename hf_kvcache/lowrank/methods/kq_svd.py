"""The least error of scores and of attention's outputs at a given rank (KQ-SVD, arXiv:2512.05916)."""

from __future__ import annotations

from hf_kvcache.lowrank.bases import beside, cheapest_basis
from hf_kvcache.lowrank.methods.base import Method
from hf_kvcache.lowrank.methods.registry import register
from hf_kvcache.lowrank.moments import LayerMoments
from hf_kvcache.lowrank.projection import LayerBasis


@register("kq_svd")
class KQSVD(Method):
    """Keys by what queries ask of them, values by what the output projection makes of them.

    The error of the scores is ``|(K - K_hat) Q^T|^2 = sum (k - k_hat) Q^T Q (k - k_hat)^T``, with the queries of all
    heads that read the keys; that of the outputs is the same with ``W_O W_O^T`` in place of ``Q^T Q``. Both are least
    for the truncated SVD of the product (``K Q^T``, ``V W_O``), which needs no more than second moments.

    Args:
        group: neighbouring KV heads that share a latent; not in the paper.
        before_rope: keys before their rotary embedding, with the queries' moments averaged over distances. Not in the
            paper, and no longer the optimum for the scores of a text, but for those of queries and keys that do not
            depend on where they stand.
        center: whose mean is taken out first; nobody's in the paper.
    """

    def __init__(self, group: int | None = 1, before_rope: bool = False, center: str = "none") -> None:
        super().__init__(group, before_rope, center)

    def solve(self, moments: LayerMoments) -> LayerBasis:
        keys, values = self.keys_of(moments), self.values_of(moments)
        if moments.output is None:
            raise ValueError(
                f"method {self.name!r} needs the plain weight of the layer's output projection; accepted: models that "
                "have one, or another method"
            )
        group = self.beside(moments.heads)
        return self.basis(
            moments,
            cheapest_basis(*keys, metric=beside(self.queries_of(moments), group)),
            cheapest_basis(*values, metric=beside(moments.output, group)),
        )
