"""Truncated SVD of keys and of values: the baseline for the other methods."""

from __future__ import annotations

from hf_kvcache.lowrank.basis import LayerBasis
from hf_kvcache.lowrank.basis_solvers import least_error_basis
from hf_kvcache.lowrank.methods.base import Method
from hf_kvcache.lowrank.methods.registry import register
from hf_kvcache.lowrank.moments import LayerMoments


@register("svd")
class SVD(Method):
    """The least error of keys after their rotary embedding, and of values, head by head. It has no options."""

    def __init__(self) -> None:
        super().__init__()

    def solve(self, moments: LayerMoments) -> LayerBasis:
        keys, values = least_error_basis(*self.keys_of(moments)), least_error_basis(*self.values_of(moments))
        return self.layer_basis(moments, keys, values)
