"""The MSE variant of TurboQuant (arXiv:2504.19874): a norm, a random-sign Hadamard rotation, and Lloyd-Max levels.

The QJL residual of the paper is left out, because softmax amplifies its variance.
"""

from __future__ import annotations

import torch

from hf_kvcache.codecs.base import Codec, Encoded, SideCodec, round_scale
from hf_kvcache.codecs.lloyd import nearest_level, normal_format
from hf_kvcache.codecs.registry import register
from hf_kvcache.kernels.page import SideFormat


class TurboQuantSide(SideCodec):
    """A norm per token and Lloyd-Max levels of the normal distribution for the rotated direction.

    Args:
        bits: width of a code, 1 to 4.
        centered: whether a key mean is subtracted first.
    """

    method = "norm"

    def __init__(self, bits: int, centered: bool = False) -> None:
        self.bits, self.centered = bits, centered

    def format(self, dim: int, page_size: int, dtype: torch.dtype) -> SideFormat:
        return normal_format(
            dim,
            self.bits,
            axis="token",
            group=dim,
            zero=False,
            rotation="signed_hadamard",
            centered=self.centered,
        )

    def encode(self, x: torch.Tensor) -> Encoded:
        norm = x.norm(dim=-1, keepdim=True)
        # Coordinates of a rotated unit vector are close to N(0, 1/d).
        codes, levels = nearest_level(x * (x.shape[-1] ** 0.5 / norm.clamp_min(1e-12)), self.bits)
        # ||x|| / ||reconstruction||: the stored scale gives the decoded vector the length of the original one.
        scale = norm / levels.norm(dim=-1, keepdim=True)
        return Encoded(codes, round_scale(scale))


@register("turboquant")
class TurboQuantCodec(Codec):
    """TurboQuant on keys and values; ``b + 16 / head_dim`` bits per element.

    Args:
        key_bits: width of the keys' codes.
        value_bits: width of the values' codes.
        center: whether to subtract the key mean of each head first, for models with large key biases.
    """

    supported_bits = (1, 2, 3, 4)
    default_bits = 4

    def __init__(self, key_bits: int | None = None, value_bits: int | None = None, center: bool = False) -> None:
        super().__init__(key_bits, value_bits)
        assert self.key_bits and self.value_bits
        self.keys = TurboQuantSide(self.key_bits, centered=center)
        self.values = TurboQuantSide(self.value_bits)
