"""Normal levels with an unbiased gain per token: a codec of this package for few bits.

Rounding to the nearest level, or to least squares, shrinks a vector: the dot product of the vector with its
approximation is smaller than that with itself. Softmax then prefers the exact tokens (sinks, recent window) to the
packed ones. Here the last scale of every token is chosen so that ``<x, x_hat> = <x, x>``. That costs no bits and no
time at decoding, and most of this codec's gain over the others is due to it (the README has the table).
"""

from __future__ import annotations

import torch

from hf_kvcache.codecs.base import Codec, Encoded, SideCodec, round_scale
from hf_kvcache.codecs.lloyd import nearest_level, normal_format
from hf_kvcache.codecs.registry import register
from hf_kvcache.kernels.page import SideFormat

_TINY = 1e-6
#: Cosine between a vector and its approximation below which the gain is no longer unbiased.
_POOR = 0.75


def unbiased_gain(x: torch.Tensor, approximation: torch.Tensor) -> torch.Tensor:
    """The factor per token that makes ``<x, factor * approximation>`` equal ``<x, x>``.

    For a poor approximation this factor would make the error large. So below a cosine of 0.75 the factor falls in
    proportion to the factor of least squares, and no token has a larger error than an approximation by zero.

    Args:
        x: ``[N, P, D]``.
        approximation: the same shape.

    Returns:
        ``[N, P, 1]``.
    """
    length = x.norm(dim=2, keepdim=True)
    other_length = approximation.norm(dim=2, keepdim=True).clamp_min(_TINY)
    cosine = (x * approximation).sum(2, keepdim=True) / (length * other_length).clamp_min(_TINY)
    slope = torch.where(cosine >= _POOR, 1 / cosine.clamp_min(_POOR), cosine.clamp_min(0) / _POOR**2)
    return slope * length / other_length


class UnbiasedKeys(SideCodec):
    """Keys: a scale and a zero point per channel, and a gain per token, in the rotated basis, less the key mean.

    Args:
        bits: width of a code.
    """

    method = "unbiased_keys"

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def format(self, dim: int, page_size: int, dtype: torch.dtype) -> SideFormat:
        return normal_format(
            dim,
            self.bits,
            axis="channel",
            group=page_size,
            other=True,
            rotation="hadamard",
            centered=True,
            balanced=True,
        )

    def encode(self, x: torch.Tensor) -> Encoded:
        gain, scale, zero = _normalize(x)
        _, levels = nearest_level((x / gain - zero) / scale, self.bits)
        scale, zero = _fit_line(levels, x / gain)
        fitted = levels * scale + zero
        fitted_gain = (x * fitted).sum(2, keepdim=True) / fitted.square().sum(2, keepdim=True).clamp_min(_TINY)
        gain = torch.where(fitted_gain > gain / 4, fitted_gain, gain)
        stored_scale, stored_zero = round_scale(scale), round_scale(zero)
        codes, levels = nearest_level((x / gain - stored_zero.float()) / _nonzero(stored_scale), self.bits)
        stored_scale, stored_zero = (round_scale(t) for t in _fit_line(levels, x / gain))
        # The gain is fitted last, to the vectors as they will be decoded, and so corrects the rounding of the other
        # two.
        gain = unbiased_gain(x, levels * stored_scale.float() + stored_zero.float())
        return Encoded(codes, stored_scale, stored_zero, round_scale(gain))


class UnbiasedValues(SideCodec):
    """Values: a scale per token in the rotated basis.

    The rotation has random signs. A plain Hadamard matrix would gather an offset that all channels share in one
    channel.

    Args:
        bits: width of a code.
    """

    method = "unbiased_values"

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def format(self, dim: int, page_size: int, dtype: torch.dtype) -> SideFormat:
        return normal_format(
            dim,
            self.bits,
            axis="token",
            group=dim,
            zero=False,
            rotation="signed_hadamard",
        )

    def encode(self, x: torch.Tensor) -> Encoded:
        scale = x.square().mean(2, keepdim=True).sqrt().clamp_min(_TINY)
        _, levels = nearest_level(x / scale, self.bits)
        scale = (x * levels).sum(2, keepdim=True) / levels.square().sum(2, keepdim=True)
        codes, levels = nearest_level(x / _nonzero(round_scale(scale)), self.bits)
        return Encoded(codes, round_scale(unbiased_gain(x, levels)))


@register("unbiased")
class UnbiasedCodec(Codec):
    """Normal levels with an unbiased gain per token.

    ``b + 32 / page_size + 16 / head_dim`` bits for keys, ``b + 16 / head_dim`` for values.

    Args:
        key_bits: width of the keys' codes.
        value_bits: width of the values' codes.
    """

    supported_bits = (1, 2, 3, 4)
    default_bits = 2

    def __init__(self, key_bits: int | None = None, value_bits: int | None = None) -> None:
        super().__init__(key_bits, value_bits)
        assert self.key_bits and self.value_bits
        self.keys = UnbiasedKeys(self.key_bits)
        self.values = UnbiasedValues(self.value_bits)


def _normalize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A gain per token, and a scale and a mean per channel, that make the entries of a page close to N(0, 1)."""
    gain = torch.ones_like(x[:, :, :1])
    for last in (False, False, True):
        relative = x / gain
        mean = relative.mean(1, keepdim=True)
        scale = (relative - mean).square().mean(1, keepdim=True).sqrt().clamp_min(_TINY)
        if not last:
            gain = ((x - mean * gain) / scale).square().mean(2, keepdim=True).sqrt().clamp_min(1e-4)
    return gain, scale, mean


def _fit_line(levels: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero per channel, ``[N, 1, D]`` each, that bring ``levels * scale + zero`` closest to ``y``."""
    level_mean, y_mean = levels.mean(1, keepdim=True), y.mean(1, keepdim=True)
    spread = levels - level_mean
    scale = (spread * (y - y_mean)).sum(1, keepdim=True) / spread.square().sum(1, keepdim=True).clamp_min(_TINY)
    scale = scale.clamp_min(_TINY)
    return scale, y_mean - scale * level_mean


def _nonzero(stored: torch.Tensor) -> torch.Tensor:
    """A stored scale as a divisor, which must not be 0 although half precision may have rounded it to 0."""
    return stored.float().clamp_min(_TINY)
