"""Palu's group-head low rank (arXiv:2407.21118)."""

from __future__ import annotations

from hf_kvcache.lowrank.basis import LayerBasis
from hf_kvcache.lowrank.basis_solvers import least_error_basis
from hf_kvcache.lowrank.methods.base import Method
from hf_kvcache.lowrank.methods.registry import register
from hf_kvcache.lowrank.moments import LayerMoments


@register("palu")
class Palu(Method):
    """Neighbouring KV heads share coefficients; the paper takes those of the keys before their rotary embedding.

    The paper decomposes the weights of the projections after a whitening by the layer's inputs ``X``: of all ``W_r`` of
    rank r, the one with the least ``|X W - X W_r|``. ``X W`` are the keys and values themselves. So these are the
    principal axes of the keys and values of a group, side by side.

    Args:
        group: number of heads of a group; None for the largest number up to 4, the paper's, that divides the KV heads.
        before_rope: whether keys are stored before their rotary embedding, as in the paper. Every step then has to
            rotate the keys that it reads.
        center: whose mean is subtracted first; the paper subtracts none.
    """

    def __init__(self, group: int | None = None, before_rope: bool = False, center: str = "none") -> None:
        super().__init__(group, before_rope, center)

    def solve(self, moments: LayerMoments) -> LayerBasis:
        keys, values = least_error_basis(*self.keys_of(moments)), least_error_basis(*self.values_of(moments))
        return self.layer_basis(moments, keys, values)
