"""The least error of scores and of attention's outputs at a given rank (KQ-SVD, arXiv:2512.05916)."""

from __future__ import annotations

from hf_kvcache.lowrank.basis import LayerBasis
from hf_kvcache.lowrank.basis_solvers import block_diagonal, least_error_basis
from hf_kvcache.lowrank.methods.base import Method
from hf_kvcache.lowrank.methods.registry import register
from hf_kvcache.lowrank.moments import LayerMoments


@register("kq_svd")
class KQSVD(Method):
    """Keys in the metric of the queries that read them, values in the metric of the output projection behind them.

    The error of the scores is ``|(K - K_hat) Q^T|^2 = sum (k - k_hat) Q^T Q (k - k_hat)^T``, with the queries of all
    heads that read the keys. The error of the outputs is the same with ``W_O W_O^T`` in place of ``Q^T Q``. Both are
    least for the truncated SVD of the product (``K Q^T``, ``V W_O``), which needs no more than second moments.

    Args:
        group: number of neighbouring KV heads that share coefficients; not in the paper.
        before_rope: store keys before their rotary embedding, with the queries' moments averaged over distances. This
            is not in the paper. It is not the optimum for the scores of a text, but for the scores of queries and keys
            that do not depend on their positions.
        center: whose mean is subtracted first; the paper subtracts none.
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
        group = self.group_size(moments.heads)
        return self.layer_basis(
            moments,
            least_error_basis(*keys, metric=block_diagonal(self.queries_of(moments), group)),
            least_error_basis(*values, metric=block_diagonal(moments.output, group)),
        )
