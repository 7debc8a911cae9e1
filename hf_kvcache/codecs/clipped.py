"""Asymmetric integers per token with a range that excludes the few largest channels (OSCAR, arXiv:2605.17757)."""

from __future__ import annotations

from hf_kvcache.codecs.base import Codec
from hf_kvcache.codecs.integer import IntegerSide
from hf_kvcache.codecs.registry import register


class ClippedSide(IntegerSide):
    """Integers per token with a clipped range. No kernel has this encoding."""

    method = None


@register("clipped")
class ClippedCodec(Codec):
    """Keys and values per token over the channels, clipped, without a rotation.

    This codec is meant for low-rank coefficients, whose basis has a rotation (``hf-kvcache calibrate --method oscar``).
    With few levels, a wide scale for the largest channels of a token costs more accuracy than clipping them.

    Args:
        key_bits: width of the keys' codes.
        value_bits: width of the values' codes.
        group_size: channels that share a scale; None for all of a token's.
        key_clip: share of a group's channels that the clipped range of keys is to cover; 1 for the whole range.
        value_clip: the same for values.
    """

    supported_bits = (2, 3, 4, 8)
    default_bits = 2

    def __init__(
        self,
        key_bits: int | None = None,
        value_bits: int | None = None,
        group_size: int | None = None,
        key_clip: float = 0.96,
        value_clip: float = 0.92,
    ) -> None:
        super().__init__(key_bits, value_bits)
        assert self.key_bits and self.value_bits
        for name, clip in (("key_clip", key_clip), ("value_clip", value_clip)):
            if isinstance(clip, bool) or not isinstance(clip, (int, float)) or not 0 < clip <= 1:
                raise ValueError(f"{name}={clip!r}; accepted: above 0 and up to 1")
        self.keys = ClippedSide(self.key_bits, "token", group_size, clip=key_clip)
        self.values = ClippedSide(self.value_bits, "token", group_size, clip=value_clip)
