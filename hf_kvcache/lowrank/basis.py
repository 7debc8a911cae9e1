"""The bases that a calibration finds for keys and values, and how they are cut to a rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_kvcache.kernels.hadamard import rotation_matrix


@dataclass(frozen=True)
class SideBasis:
    """All directions of the keys or values of one layer: ``x = mean + ((x - mean) @ down) @ up``.

    Attributes:
        down: float32 ``[G, W, W]``, ``W = g * D``, the most important direction first.
        up: float32 ``[G, W, W]``, the inverse of ``down``.
        energy: float32 ``[G, W]``, the error that dropping a direction causes, as a share of the error that dropping
            all directions of the layer causes.
        mean: float32 ``[G, W]``, or None.
    """

    down: torch.Tensor
    up: torch.Tensor
    energy: torch.Tensor
    mean: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Number of directions, ``W``."""
        return self.down.shape[2]

    def cut(self, rank: int, hadamard: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """``down [G, W, rank]`` and ``up [G, rank, W]`` of the first ``rank`` directions.

        Args:
            rank: number of directions that stay.
            hadamard: whether they are put in the order of their reversed bits and mixed by a Hadamard matrix.
        """
        down, up = self.down[:, :, :rank], self.up[:, :rank]
        if not hadamard:
            return down.contiguous(), up.contiguous()
        order = bit_reversal(rank)
        matrix = rotation_matrix(rank, "hadamard", down.dtype, down.device)
        assert matrix is not None
        return down[:, :, order] @ matrix, matrix.T @ up[:, order]


@dataclass(frozen=True)
class LayerBasis:
    """The bases of one layer.

    Attributes:
        keys: basis of the keys.
        values: basis of the values.
        heads: number of KV heads.
        before_rope: whether the keys' basis is one of keys before their rotary embedding.
        score: mean squared error of the scores, scaled as softmax sees them, per unit of the keys' energy. Where the
            energies are errors of scores, this is the mean squared score; elsewhere it is measured at half the width.
        hadamard: whether the directions that stay after a cut are mixed by a bit reversal and a Hadamard matrix.
    """

    keys: SideBasis
    values: SideBasis
    heads: int
    before_rope: bool = False
    score: float = 1.0
    hadamard: bool = False


def bit_reversal(count: int) -> torch.Tensor:
    """``0 .. count - 1`` in the order of their reversed bits, int64.

    Where ``count`` is no power of two, the bits are those of the next power of two, and larger numbers are left out.
    """
    bits = (count - 1).bit_length()
    reversed_ = (int(f"{index:0{bits}b}"[::-1], 2) if bits else 0 for index in range(2**bits))
    return torch.tensor([index for index in reversed_ if index < count], device="cpu")
