"""Means and second moments of a model's keys, values and queries, from which the bases are solved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class States:
    """Moments of the keys or the values of one layer; ``s`` neighbouring KV heads are side by side, ``W = s * D``.

    Attributes:
        mean: float64 ``[Hkv / s, W]``.
        second: float64 ``[Hkv / s, W, W]``, the mean of ``x x^T``.
    """

    mean: torch.Tensor
    second: torch.Tensor

    def grouped(self, group: int, heads: int, centered: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Second moments of fewer heads side by side, and the mean about which they are taken.

        Args:
            group: number of heads side by side, ``g``; a divisor of ``s``.
            heads: number of KV heads, ``Hkv``.
            centered: whether the mean is subtracted first.

        Returns:
            ``[G, g * D, g * D]`` and ``[G, g * D]`` (None where the mean is not subtracted), ``G = Hkv / g``.

        Raises:
            ValueError: if fewer than ``g`` heads were measured side by side.
        """
        together = heads // self.mean.shape[0]
        if together % group:
            raise ValueError(f"group={group!r}: the moments are of {together} heads side by side; collect more")
        mean = self.mean.reshape(heads // group, -1)
        split = self.second.unflatten(1, (together // group, -1)).unflatten(3, (together // group, -1))
        second = split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).flatten(0, 1)
        if not centered:
            return second, None
        return second - mean[:, :, None] * mean[:, None, :], mean


@dataclass(frozen=True)
class LayerMoments:
    """Moments of one attention layer. Everything is float64 and on the CPU.

    Attributes:
        heads: number of KV heads, ``Hkv``.
        query_heads: number of query heads, ``Hq``.
        scaling: factor of the scores.
        keys: of the keys after their rotary embedding.
        values: of the values as they are cached.
        queries: ``[Hkv, Dk, Dk]``, the mean of ``q q^T`` over the tokens, summed over the query heads of a KV head.
        output: ``[Hkv, Dv, Dv]``, ``W W^T`` of the output projection of each query head, summed like the queries; None
            where the projection has no plain weight.
        keys_before: of keys before their rotary embedding; None where the embedding cannot be undone.
        queries_before: ``[Hkv, Dk, Dk]``, the second moments of the queries as keys before their rotary embedding see
            them, averaged over their distances; None where ``keys_before`` is None.
    """

    heads: int
    query_heads: int
    scaling: float
    keys: States
    values: States
    queries: torch.Tensor
    output: torch.Tensor | None = None
    keys_before: States | None = None
    queries_before: torch.Tensor | None = None


@dataclass(frozen=True)
class Moments:
    """Moments of a model.

    Attributes:
        layers: by index of the layer.
        tokens: number of tokens that were counted.
        fingerprint: what the model's config says of the model.
        weights: samples of the model's weights, by layer.
    """

    layers: dict[int, LayerMoments] = field(repr=False)
    tokens: int
    fingerprint: dict[str, Any]
    weights: dict[int, list[float]]


def largest_divisor(heads: int, most: int | None) -> int:
    """The largest number up to ``most`` that divides ``heads``."""
    return max(g for g in range(1, min(heads, most or heads) + 1) if heads % g == 0)
