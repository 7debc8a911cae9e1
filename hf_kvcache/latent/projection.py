"""The bases in which the layers of a model store keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SideProjection:
    """Keys or values of one layer as latents: ``latent = (x - mean) @ down``, ``x ~ mean + latent @ up``.

    ``g`` neighbouring KV heads share a latent: ``x`` is their vectors side by side. With ``g = 1`` each head has one of
    its own.

    Attributes:
        down: float32 ``[G, g * D, r]``, ``G = Hkv / g``.
        up: float32 ``[G, r, g * D]``.
        mean: float32 ``[G, g * D]``, what is taken out first; None for nothing.
    """

    down: torch.Tensor
    up: torch.Tensor
    mean: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Width of a latent."""
        return self.down.shape[2]


@dataclass(frozen=True)
class LayerProjection:
    """How one layer's keys and values are stored.

    Attributes:
        keys: of the keys.
        values: of the values.
        heads: number of KV heads, ``Hkv``; the same number of them share a latent on both sides.
        before_rope: whether the basis is one of keys before their rotary embedding.
    """

    keys: SideProjection
    values: SideProjection
    heads: int
    before_rope: bool = False

    @property
    def groups(self) -> int:
        """Latents of a token, ``G``."""
        return self.keys.down.shape[0]
