"""The least error of scores and outputs when coefficients are rounded to few bits; this package's own method."""

from __future__ import annotations

from dataclasses import replace

from hf_kvcache.lowrank.basis import LayerBasis
from hf_kvcache.lowrank.basis_solvers import balance_rounding
from hf_kvcache.lowrank.methods.kq_svd import KQSVD
from hf_kvcache.lowrank.methods.registry import register
from hf_kvcache.lowrank.moments import LayerMoments


@register("balanced")
class Balanced(KQSVD):
    """The directions of :class:`KQSVD`, each coefficient scaled by how much rounding it may cost.

    Made for codecs that rotate (all but ``int`` and ``fp8``): they spread their rounding error evenly over
    the coefficients, whatever these matter. Cut to any rank, it leaves out what KQ-SVD leaves out.

    Args:
        group: number of neighbouring KV heads that share coefficients; None for the largest number up to 4 that
            divides the KV heads.
        before_rope: store keys before their rotary embedding. Fewer directions matter then, but every step has to
            rotate the keys that it reads.
        center: whose mean is subtracted first.
    """

    def __init__(self, group: int | None = None, before_rope: bool = False, center: str = "keys") -> None:
        super().__init__(group, before_rope, center)

    def solve(self, moments: LayerMoments) -> LayerBasis:
        basis = super().solve(moments)
        return replace(basis, keys=balance_rounding(basis.keys), values=balance_rounding(basis.values))
