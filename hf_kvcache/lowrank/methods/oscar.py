"""OSCAR's rotations for storage in two bits (arXiv:2605.17757)."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.hadamard import rotation_matrix
from hf_kvcache.lowrank.bases import shares
from hf_kvcache.lowrank.methods.base import Method
from hf_kvcache.lowrank.methods.registry import register
from hf_kvcache.lowrank.moments import LayerMoments
from hf_kvcache.lowrank.projection import LayerBasis, SideBasis, SideProjection


@register("oscar")
class Oscar(Method):
    """Orthonormal axes of what attention looks at, spread by a Hadamard rotation so that a token's codes fit one scale.

    Keys are turned to the axes of ``Q^T Q``, along which errors of the scores add up without mixed terms; values to
    those of the values weighted by their squared scores. Then follow a bit reversal of the ordered axes, which deals
    important and unimportant ones out evenly where scales are shared by groups of channels or the Hadamard matrix has
    blocks, and the Hadamard matrix. At full rank nothing is lost; the codec ``clipped`` is made for what comes out.

    Args:
        center: whose mean is taken out first; nobody's in the paper.
    """

    def __init__(self, center: str = "none") -> None:
        super().__init__(center=center)

    def solve(self, moments: LayerMoments) -> LayerBasis:
        keys, key_mean = self.keys_of(moments)
        weights, axes = torch.linalg.eigh(moments.queries)
        key_errors = weights.clamp_min(0) * torch.einsum("hdi,hde,hei->hi", axes, keys, axes)
        scored, value_mean = moments.scored.grouped(1, moments.heads, self.centered("values"))
        value_errors, value_axes = torch.linalg.eigh(scored)
        return self.basis(moments, _ordered(axes, key_errors, key_mean), _ordered(value_axes, value_errors, value_mean))

    def finish(self, side: SideProjection) -> SideProjection:
        order = bit_reversal(side.rank)
        spread = rotation_matrix(side.rank, "hadamard", side.down.dtype, side.down.device)
        assert spread is not None
        return SideProjection(side.down[:, :, order] @ spread, spread.T @ side.up[:, order], side.mean)


def bit_reversal(count: int) -> torch.Tensor:
    """``0 .. count - 1`` in the order of their reversed bits, int64; those of the next power of two that exist."""
    bits = (count - 1).bit_length()
    reversed_ = (int(f"{index:0{bits}b}"[::-1], 2) if bits else 0 for index in range(2**bits))
    return torch.tensor([index for index in reversed_ if index < count])


def _ordered(axes: torch.Tensor, errors: torch.Tensor, mean: torch.Tensor | None) -> SideBasis:
    """Orthonormal ``axes [Hkv, D, D]`` (columns) by the errors ``[Hkv, D]`` of dropping them."""
    order = errors.argsort(-1, descending=True)
    down = axes.gather(2, order[:, None, :].expand_as(axes)).float()
    return SideBasis(down, down.mT, shares(errors.gather(1, order)), None if mean is None else mean.float())
