"""The bases that a calibration finds for keys and values, and how they are cut to a rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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

    def cut(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``down [G, W, rank]`` and ``up [G, rank, W]`` of the first ``rank`` directions."""
        return self.down[:, :, :rank].contiguous(), self.up[:, :rank].contiguous()


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
    """

    keys: SideBasis
    values: SideBasis
    heads: int
    before_rope: bool = False
    score: float = 1.0
