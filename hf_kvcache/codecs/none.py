"""Dense pages: the codec that stores vectors as they are, the baseline of every comparison."""

from __future__ import annotations

import torch

from hf_kvcache.codecs.base import Codec, Encoded, SideCodec
from hf_kvcache.codecs.registry import register
from hf_kvcache.kernels.page import SideFormat


class DenseSide(SideCodec):
    """Stores the vectors as they are."""

    method = "dense"

    def format(self, dim: int, page_size: int, dtype: torch.dtype) -> SideFormat:
        return SideFormat(dim, 8 * dtype.itemsize, level="dense", zero=False, dense_dtype=dtype)

    def encode(self, x: torch.Tensor) -> Encoded:
        return Encoded(x)


@register("none")
class DenseCodec(Codec):
    """Pages in the model's own dtype."""

    def __init__(self, key_bits: int | None = None, value_bits: int | None = None) -> None:
        super().__init__(key_bits, value_bits)
        self.keys = self.values = DenseSide()
