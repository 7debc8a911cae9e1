"""8-bit floats (e4m3) with a scale per token and head."""

from __future__ import annotations

import torch

from hf_kvcache.codecs.base import Codec, Encoded, SideCodec, round_scale
from hf_kvcache.codecs.registry import register
from hf_kvcache.kernels.page import SideFormat

_FLOAT8 = torch.float8_e4m3fn
_FLOAT8_MAX = torch.finfo(_FLOAT8).max


class Float8Side(SideCodec):
    """Each vector scaled to the range of e4m3 and cast."""

    method = "float8"

    def format(self, dim: int, page_size: int, dtype: torch.dtype) -> SideFormat:
        return SideFormat(dim, 8, level="float8", axis="token", group=dim, zero=False)

    def encode(self, x: torch.Tensor) -> Encoded:
        scale = round_scale((x.abs().amax(-1, keepdim=True) / _FLOAT8_MAX).clamp_min(2.0**-14))
        # The rounded scale may be a little too small for the largest element: saturate, e4m3fn has no infinity.
        cast = (x / scale.float()).clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(_FLOAT8)
        return Encoded(cast.view(torch.uint8), scale)


@register("fp8")
class Float8Codec(Codec):
    """e4m3 keys and values."""

    def __init__(self, key_bits: int | None = None, value_bits: int | None = None) -> None:
        super().__init__(key_bits, value_bits)
        self.keys = self.values = Float8Side()
