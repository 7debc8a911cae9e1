"""Truncated SVD of keys and of values: what the other methods are measured against."""

from __future__ import annotations

from hf_kvcache.lowrank.bases import cheapest_basis
from hf_kvcache.lowrank.methods.base import Method
from hf_kvcache.lowrank.methods.registry import register
from hf_kvcache.lowrank.moments import LayerMoments
from hf_kvcache.lowrank.projection import LayerBasis


@register("svd")
class SVD(Method):
    """The least error of keys after their rotary embedding, and of values, head by head. It has no options."""

    def __init__(self) -> None:
        super().__init__()

    def solve(self, moments: LayerMoments) -> LayerBasis:
        keys, values = cheapest_basis(*self.keys_of(moments)), cheapest_basis(*self.values_of(moments))
        return self.basis(moments, keys, values)
