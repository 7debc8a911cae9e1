"""Palu's group-head low rank (arXiv:2407.21118)."""

from __future__ import annotations

from hf_kvcache.lowrank.bases import cheapest_basis
from hf_kvcache.lowrank.methods.base import Method
from hf_kvcache.lowrank.methods.registry import register
from hf_kvcache.lowrank.moments import LayerMoments
from hf_kvcache.lowrank.projection import LayerBasis


@register("palu")
class Palu(Method):
    """Neighbouring KV heads share a latent, that of keys before their rotary embedding.

    The paper decomposes the projections' weights behind a whitening by the layer's inputs ``X``: of all ``W_r`` of
    rank r, the one with the least ``|X W - X W_r|``. ``X W`` are the keys and values themselves, so these are the
    principal axes of the keys and values of a group, taken side by side.

    Args:
        group: heads of a group; None for the most up to 4, the paper's, that divide the KV heads.
        before_rope: whether keys are stored before their rotary embedding, as in the paper.
        center: whose mean is taken out first; nobody's in the paper.
    """

    def __init__(self, group: int | None = None, before_rope: bool = True, center: str = "none") -> None:
        super().__init__(group, before_rope, center)

    def solve(self, moments: LayerMoments) -> LayerBasis:
        keys, values = cheapest_basis(*self.keys_of(moments)), cheapest_basis(*self.values_of(moments))
        return self.basis(moments, keys, values)
