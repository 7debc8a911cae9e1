"""Variance-normalised pages (KVarN, arXiv:2606.03458)."""

from __future__ import annotations

import torch

from hf_kvcache.codecs.base import Codec, Encoded, SideCodec, asymmetric, check_packable, round_scale
from hf_kvcache.codecs.registry import register
from hf_kvcache.kernels.page import Axis, SideFormat

_ITERATIONS = 16
_STD_RANGE = (1e-3, 1e3)
_LOG_SCALE_RANGE = (-0.3, 10.0)


def normalise_variance(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column scales that even out the standard deviations of each page.

    Alternates between columns (channels) and rows (tokens), dividing by the standard deviation on a log scale, and
    keeps the iterate whose standard deviations have the smallest ratio of largest to smallest.

    Args:
        x: pages ``[N, P, D]``.

    Returns:
        Row scales ``[N, P, 1]`` and column scales ``[N, 1, D]``.
    """
    log_row, log_column = x.new_zeros(x.shape[0], x.shape[1], 1), x.new_zeros(x.shape[0], 1, x.shape[2])
    best_row, best_column = log_row, log_column
    best = x.new_full((x.shape[0], 1, 1), float("inf"))
    for _ in range(_ITERATIONS + 1):
        scaled = x * (-log_row - log_column).exp()
        column_std = scaled.std(1, keepdim=True, unbiased=False).clamp(*_STD_RANGE)
        row_std = scaled.std(2, keepdim=True, unbiased=False).clamp(*_STD_RANGE)
        spread = column_std.amax(2, True) / column_std.amin(2, True) * row_std.amax(1, True) / row_std.amin(1, True)
        better = spread < best
        best = torch.where(better, spread, best)
        best_row = torch.where(better, log_row, best_row)
        best_column = torch.where(better, log_column, best_column)
        log_column = (log_column + column_std.log()).clamp(*_LOG_SCALE_RANGE)
        scaled = x * (-log_row - log_column).exp()
        row_std = scaled.std(2, keepdim=True, unbiased=False).clamp(*_STD_RANGE)
        log_row = (log_row + row_std.log()).clamp(*_LOG_SCALE_RANGE)
    return best_row.exp(), best_column.exp()


class VarianceNormalisedSide(SideCodec):
    """Asymmetric integers along one axis of a page whose rows and columns were normalised.

    Args:
        bits: width of a code.
        axis: the axis with scale and zero; the other axis has a second scale.
    """

    def __init__(self, bits: int, axis: Axis) -> None:
        self.bits, self.axis = bits, axis

    def format(self, dim: int, page_size: int, dtype: torch.dtype) -> SideFormat:
        check_packable(self.bits, dim)
        group = page_size if self.axis == "channel" else dim
        return SideFormat(dim, self.bits, axis=self.axis, group=group, other=True, rotation="hadamard")

    def encode(self, x: torch.Tensor) -> Encoded:
        rows, columns = normalise_variance(x)
        # The scale along the axis of `scale` is absorbed by it; only the other one is stored.
        other = round_scale(rows if self.axis == "channel" else columns)
        codes, scale, zero = asymmetric(x / other.float(), (1 if self.axis == "channel" else 2,), self.bits)
        return Encoded(codes, scale, zero, other)


@register("kvarn")
class VarianceNormalisedCodec(Codec):
    """KVarN: keys with scales per channel, values per token, each with a second scale across.

    Args:
        key_bits: width of the keys' codes.
        value_bits: width of the values' codes.
    """

    supported_bits = (2, 3, 4, 8)
    default_bits = 4

    def __init__(self, key_bits: int | None = None, value_bits: int | None = None) -> None:
        super().__init__(key_bits, value_bits)
        assert self.key_bits and self.value_bits
        self.keys = VarianceNormalisedSide(self.key_bits, "channel")
        self.values = VarianceNormalisedSide(self.value_bits, "token")
