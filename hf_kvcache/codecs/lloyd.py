"""Lloyd-Max levels of the standard normal distribution: the scalar quantizer with the least mean squared error."""

from __future__ import annotations

import itertools
from functools import lru_cache
from math import erf, exp, inf, pi, sqrt
from typing import Any

import torch

from hf_kvcache.codecs.base import check_packable
from hf_kvcache.kernels.page import SideFormat

_LARGEST_BYTE = 127


@lru_cache(maxsize=8)
def normal_levels(bits: int) -> tuple[float, ...]:
    """The ``2**bits`` levels of codes, ascending: the Lloyd-Max levels, rounded to a grid of signed bytes.

    They are multiples of 1/127 of the largest level, so that integer dot products are exact. The rounding raises the
    mean squared error by some 0.1 %.
    """
    exact = lloyd_max_levels(bits)
    step = exact[-1] / _LARGEST_BYTE
    return tuple(round(level / step) * step for level in exact)


@lru_cache(maxsize=8)
def lloyd_max_levels(bits: int) -> tuple[float, ...]:
    """The Lloyd-Max levels of N(0, 1), ascending, by Lloyd's fixed-point iteration on exact integrals."""
    count = 2**bits
    levels = [-3 + 6 * (i + 0.5) / count for i in range(count)]
    for _ in range(10_000):
        edges = [-inf, *((a + b) / 2 for a, b in itertools.pairwise(levels)), inf]
        updated = [_truncated_mean(a, b) for a, b in itertools.pairwise(edges)]
        change = max(abs(a - b) for a, b in zip(levels, updated, strict=True))
        levels = updated
        if change < 1e-12:
            break
    return tuple(levels)


def normal_format(dim: int, bits: int, **constants: Any) -> SideFormat:
    """The format of a side with these levels; ``constants`` are the other attributes of :class:`SideFormat`."""
    check_packable(bits, dim)
    return SideFormat(dim, bits, level="table", table=normal_levels(bits), **constants)


#: Cells of the lookup grid per unit, and the end of the grid, beyond which only the outermost levels are nearest.
_CELLS = 512
_EDGE = 4


def nearest_level(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes (uint8) of the levels nearest to ``x``, up to ties within 1/1024, and the levels themselves."""
    codes, levels = _grid(bits, x.device)
    # A lookup on a fine grid takes the same time for any number of levels, and a fraction of that of a binary search.
    # Cells are clamped as integers, so that even NaN falls in some cell.
    cells = x.mul(_CELLS).add_(_EDGE * _CELLS + 0.5).to(torch.int32).clamp_(0, 2 * _EDGE * _CELLS).view(-1)
    return torch.index_select(codes, 0, cells).view(x.shape), torch.index_select(levels, 0, cells).view(x.shape)


@lru_cache(maxsize=16)
def _grid(bits: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Code and level of every cell of the lookup grid."""
    with torch.inference_mode(False):
        table = torch.tensor(normal_levels(bits), dtype=torch.float64, device="cpu")
        cells = torch.arange(2 * _EDGE * _CELLS + 1, dtype=torch.float64, device="cpu") / _CELLS - _EDGE
        codes = torch.bucketize(cells, (table[1:] + table[:-1]) / 2)
        return codes.to(torch.uint8).to(device), table[codes].float().to(device)


def _truncated_mean(low: float, high: float) -> float:
    """E[X | low < X < high] for X ~ N(0, 1)."""

    def density(t: float) -> float:
        return exp(-t * t / 2) / sqrt(2 * pi)

    def cumulative(t: float) -> float:
        return (1 + erf(t / sqrt(2))) / 2

    return (density(low) - density(high)) / (cumulative(high) - cumulative(low))
