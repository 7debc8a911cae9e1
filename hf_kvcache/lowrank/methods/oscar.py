"""OSCAR's rotations for storage in two bits (arXiv:2605.17757)."""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_kvcache.lowrank.basis import LayerBasis, SideBasis
from hf_kvcache.lowrank.basis_solvers import energy_shares
from hf_kvcache.lowrank.methods.base import Method
from hf_kvcache.lowrank.methods.registry import register
from hf_kvcache.lowrank.moments import LayerMoments


@register("oscar")
class Oscar(Method):
    """Orthonormal axes by their weight in attention, mixed by a Hadamard matrix so that one scale fits a token's codes.

    Keys are rotated to the axes of ``Q^T Q``, along which errors of the scores add up without mixed terms. Values are
    rotated to the axes of the values weighted by their squared scores. After the cut, a bit reversal of the ordered
    axes and the Hadamard matrix follow. The bit reversal deals important and unimportant axes out evenly where groups
    of channels share scales or the Hadamard matrix has blocks. At full rank nothing is lost. The codec ``clipped`` is
    made for these coefficients.

    Args:
        center: whose mean is subtracted first; the paper subtracts none.
    """

    def __init__(self, center: str = "none") -> None:
        super().__init__(center=center)

    def solve(self, moments: LayerMoments) -> LayerBasis:
        keys, key_mean = self.keys_of(moments)
        weights, axes = torch.linalg.eigh(moments.queries)
        key_errors = weights.clamp_min(0) * torch.einsum("hdi,hde,hei->hi", axes, keys, axes)
        scored, value_mean = moments.scored.grouped(1, moments.heads, self.centered("values"))
        value_errors, value_axes = torch.linalg.eigh(scored)
        basis = self.layer_basis(
            moments, _ordered(axes, key_errors, key_mean), _ordered(value_axes, value_errors, value_mean)
        )
        return replace(basis, hadamard=True)


def _ordered(axes: torch.Tensor, errors: torch.Tensor, mean: torch.Tensor | None) -> SideBasis:
    """Orthonormal ``axes [Hkv, D, D]`` (columns), ordered by the errors ``[Hkv, D]`` of dropping them."""
    order = errors.argsort(-1, descending=True)
    down = axes.gather(2, order[:, None, :].expand_as(axes)).float()
    return SideBasis(down, down.mT, energy_shares(errors.gather(1, order)), None if mean is None else mean.float())
