"""The least error of scores and outputs when latents are rounded to few bits; ours."""

from __future__ import annotations

from dataclasses import replace

from hf_kvcache.lowrank.bases import balanced
from hf_kvcache.lowrank.methods.kq_svd import KQSVD
from hf_kvcache.lowrank.methods.registry import register
from hf_kvcache.lowrank.moments import LayerMoments
from hf_kvcache.lowrank.projection import LayerBasis


@register("balanced")
class Balanced(KQSVD):
    """The directions of :class:`KQSVD`, each latent scaled by how much rounding it may cost.

    Made for codecs that rotate (all but ``int``, ``fp8`` and ``clipped``): they spread their rounding error evenly,
    whatever the latents are worth. Cut to any rank it leaves out what KQ-SVD leaves out.

    Args:
        group: neighbouring KV heads that share a latent; None for the most up to 4 that divide them.
        before_rope: keys before their rotary embedding: fewer directions matter, but reading has to rotate them.
        center: whose mean is taken out first.
    """

    def __init__(self, group: int | None = None, before_rope: bool = True, center: str = "keys") -> None:
        super().__init__(group, before_rope, center)

    def solve(self, moments: LayerMoments) -> LayerBasis:
        basis = super().solve(moments)
        return replace(basis, keys=balanced(basis.keys), values=balanced(basis.values))
