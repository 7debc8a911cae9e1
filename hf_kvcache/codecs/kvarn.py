"""Variance-normalized pages (KVarN, arXiv:2606.03458)."""

from __future__ import annotations

import torch

from hf_kvcache.codecs.base import Codec, Encoded, SideCodec, asymmetric, check_packable, round_scale
from hf_kvcache.codecs.registry import register
from hf_kvcache.kernels.page import Axis, SideFormat

_ITERATIONS = 16
_STD_RANGE = (1e-3, 1e3)
_LOG_SCALE_RANGE = (-0.3, 10.0)


def normalize_variance(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column scales that even out the standard deviations of each page.

    Alternates between columns (channels) and rows (tokens), dividing by the standard deviation on a log scale, and
    keeps the iterate whose standard deviations have the smallest ratio of largest to smallest.

    Args:
        x: pages ``[N, P, D]``.

    Returns:
        Row scales ``[N, P, 1]`` and column scales ``[N, 1, D]``.
    """
    squares = x.square()
    log_row, log_column = x.new_zeros(x.shape[0], x.shape[1], 1), x.new_zeros(x.shape[0], 1, x.shape[2])
    best_row, best_column = log_row, log_column
    best = x.new_full((x.shape[0], 1, 1), float("inf"))
    for _ in range(_ITERATIONS + 1):
        column_std = _column_std(x, squares, (-log_row).exp(), (-log_column).exp())
        row_std = _row_std(x, squares, (-log_row).exp(), (-log_column).exp())
        spread = column_std.amax(2, True) / column_std.amin(2, True) * row_std.amax(1, True) / row_std.amin(1, True)
        better = spread < best
        best = torch.where(better, spread, best)
        best_row = torch.where(better, log_row, best_row)
        best_column = torch.where(better, log_column, best_column)
        log_column = (log_column + column_std.log()).clamp(*_LOG_SCALE_RANGE)
        row_std = _row_std(x, squares, (-log_row).exp(), (-log_column).exp())
        log_row = (log_row + row_std.log()).clamp(*_LOG_SCALE_RANGE)
    return best_row.exp(), best_column.exp()


def _column_std(x: torch.Tensor, squares: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Standard deviations ``[N, 1, D]`` of the columns of ``x * rows * columns``, from two products with the pages."""
    mean = torch.matmul(rows.transpose(1, 2), x) / x.shape[1]
    power = torch.matmul(rows.square().transpose(1, 2), squares) / x.shape[1]
    return (columns * (power - mean.square()).clamp_min(0).sqrt()).clamp(*_STD_RANGE)


def _row_std(x: torch.Tensor, squares: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Standard deviations ``[N, P, 1]`` of the rows of ``x * rows * columns``."""
    # Not a matrix product, which would round one page in another way than several: a page must not depend on the
    # others.
    mean = (x * columns).sum(2, keepdim=True) / x.shape[2]
    power = (squares * columns.square()).sum(2, keepdim=True) / x.shape[2]
    return (rows * (power - mean.square()).clamp_min(0).sqrt()).clamp(*_STD_RANGE)


class VarianceNormalizedSide(SideCodec):
    """Asymmetric integers along one axis of a page whose rows and columns have been normalized.

    Args:
        bits: width of a code.
        axis: the axis with scale and zero; the other axis has a second scale.
    """

    method = "kvarn"

    def __init__(self, bits: int, axis: Axis) -> None:
        self.bits, self.axis = bits, axis

    def format(self, dim: int, page_size: int, dtype: torch.dtype) -> SideFormat:
        check_packable(self.bits, dim)
        group = page_size if self.axis == "channel" else dim
        return SideFormat(dim, self.bits, axis=self.axis, group=group, other=True, rotation="hadamard")

    def encode(self, x: torch.Tensor) -> Encoded:
        rows, columns = normalize_variance(x)
        # The normalization along the axis of `scale` becomes part of `scale`; only the other one is stored.
        other = round_scale(rows if self.axis == "channel" else columns)
        codes, scale, zero = asymmetric(x / other.float(), (1 if self.axis == "channel" else 2,), self.bits)
        return Encoded(codes, scale, zero, other)


@register("kvarn")
class VarianceNormalizedCodec(Codec):
    """KVarN: keys with scales per channel, values with scales per token, each with a second scale along the other axis.

    Args:
        key_bits: width of the keys' codes.
        value_bits: width of the values' codes.
    """

    supported_bits = (2, 3, 4, 8)
    default_bits = 4

    def __init__(self, key_bits: int | None = None, value_bits: int | None = None) -> None:
        super().__init__(key_bits, value_bits)
        assert self.key_bits and self.value_bits
        self.keys = VarianceNormalizedSide(self.key_bits, "channel")
        self.values = VarianceNormalizedSide(self.value_bits, "token")
