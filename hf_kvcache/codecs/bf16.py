"""Dense pages in bfloat16, for models that run in float32."""

from __future__ import annotations

import torch

from hf_kvcache.codecs.base import Codec, Encoded, SideCodec
from hf_kvcache.codecs.registry import register
from hf_kvcache.kernels.page import SideFormat


class BFloat16Side(SideCodec):
    """Stores the vectors in bfloat16."""

    method = "dense"

    def format(self, dim: int, page_size: int, dtype: torch.dtype) -> SideFormat:
        return SideFormat(dim, 16, level="dense", zero=False, dense_dtype=torch.bfloat16)

    def encode(self, x: torch.Tensor) -> Encoded:
        return Encoded(x.bfloat16())


@register("bf16")
class BFloat16Codec(Codec):
    """bfloat16 keys and values, for models of any dtype."""

    def __init__(self, key_bits: int | None = None, value_bits: int | None = None) -> None:
        super().__init__(key_bits, value_bits)
        self.keys = self.values = BFloat16Side()
