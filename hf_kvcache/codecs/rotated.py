"""Grouped asymmetric integers in a Hadamard-rotated basis; keys per channel, or per token less their mean."""

from __future__ import annotations

from hf_kvcache.codecs.base import Codec
from hf_kvcache.codecs.integer import IntegerSide
from hf_kvcache.codecs.registry import register
from hf_kvcache.kernels.page import Axis


@register("rotated")
class RotatedCodec(Codec):
    """KIVI's integers after an orthonormal Hadamard over the head dimension of keys and values.

    The query is rotated once per step and the output rotated back once, so a rotation costs nothing per cached token.
    From per-token keys a key mean is subtracted, one for each head. It is the mean of the first tokens that are packed,
    without attention sinks. It changes all scores of a query alike, so it does not change the softmax.

    Args:
        key_bits: width of the keys' codes.
        value_bits: width of the values' codes.
        group_size: tokens or channels that share a scale; None for the whole page or row.
        key_axis: ``"channel"`` (KIVI; the more accurate) or ``"token"`` (a packed token can be moved as it is).
    """

    supported_bits = (2, 3, 4, 8)
    default_bits = 4

    def __init__(
        self,
        key_bits: int | None = None,
        value_bits: int | None = None,
        group_size: int | None = None,
        key_axis: Axis = "channel",
    ) -> None:
        super().__init__(key_bits, value_bits)
        assert self.key_bits and self.value_bits
        if key_axis not in ("channel", "token"):
            raise ValueError(f"key_axis={key_axis!r} is not known; accepted: 'channel', 'token'")
        self.keys = IntegerSide(self.key_bits, key_axis, group_size, "hadamard", centered=key_axis == "token")
        self.values = IntegerSide(self.value_bits, "token", group_size, "hadamard")
