"""Grouped asymmetric integers in KIVI's layout (arXiv:2402.02750), unrotated."""

from __future__ import annotations

from typing import ClassVar

import torch

from hf_kvcache.codecs.base import Codec, Encoded, SideCodec, asymmetric, check_divides, check_packable
from hf_kvcache.codecs.registry import register
from hf_kvcache.kernels.page import Axis, Rotation, SideFormat


class IntegerSide(SideCodec):
    """Asymmetric integers with a scale and zero point per channel (over tokens) or per token (over channels).

    Args:
        bits: width of a code.
        axis: the axis that has a scale of its own.
        group_size: tokens or channels that share a scale; None for the whole page or row.
        rotation: rotation of the vectors before encoding.
        centered: whether a key mean is subtracted first.
    """

    method: ClassVar[str | None] = "integer"

    def __init__(
        self,
        bits: int,
        axis: Axis,
        group_size: int | None = None,
        rotation: Rotation = "none",
        centered: bool = False,
    ) -> None:
        self.bits, self.axis, self.group_size = bits, axis, group_size
        self.rotation: Rotation = rotation
        self.centered = centered

    def format(self, dim: int, page_size: int, dtype: torch.dtype) -> SideFormat:
        check_packable(self.bits, dim)
        whole, what = (page_size, "page_size") if self.axis == "channel" else (dim, "head_dim")
        group = whole if self.group_size is None else self.group_size
        check_divides("group_size", group, whole, what)
        return SideFormat(dim, self.bits, axis=self.axis, group=group, rotation=self.rotation, centered=self.centered)

    def encode(self, x: torch.Tensor) -> Encoded:
        dim = 1 if self.axis == "channel" else 2
        grouped = x.unflatten(dim, (-1, self.group_size or x.shape[dim]))
        codes, scale, zero = asymmetric(grouped, (dim + 1,), self.bits)
        return Encoded(codes.flatten(dim, dim + 1), scale.squeeze(dim + 1), zero.squeeze(dim + 1))


@register("int")
class IntegerCodec(Codec):
    """Keys per channel over a page's tokens, values per token over the channels.

    Args:
        key_bits: width of the keys' codes.
        value_bits: width of the values' codes.
        group_size: tokens (keys) and channels (values) that share a scale; None for the whole page and row.
    """

    supported_bits = (2, 3, 4, 8)
    default_bits = 4

    def __init__(
        self, key_bits: int | None = None, value_bits: int | None = None, group_size: int | None = None
    ) -> None:
        super().__init__(key_bits, value_bits)
        assert self.key_bits and self.value_bits
        self.keys = IntegerSide(self.key_bits, "channel", group_size)
        self.values = IntegerSide(self.value_bits, "token", group_size)
