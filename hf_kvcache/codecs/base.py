"""The base classes of codecs. A codec has two side codecs, each an ``encode`` with the constants of its page."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch

from hf_kvcache.kernels.page import SideFormat

#: Scales and zero points are stored in half precision, within its range.
SCALE_DTYPE = torch.float16
_SCALE_MAX = torch.finfo(SCALE_DTYPE).max
#: Smallest scale: below it, half precision has too few bits left for a useful grid.
_SCALE_MIN = 2.0**-14


class Encoded(NamedTuple):
    """One side of ``N`` pages before the bits are packed.

    Attributes:
        codes: uint8 ``[N, P, D]`` below ``2**bits`` (or the elements themselves, for dense pages).
        scale: ``[N, *SideFormat.scale_shape(P)]``; None for dense pages.
        zero: same shape as ``scale``, or None.
        other: ``[N, *SideFormat.other_shape(P)]``, or None.
    """

    codes: torch.Tensor
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    other: torch.Tensor | None = None


class SideCodec(ABC):
    """Encodes one side (keys or values) of pages.

    ``method`` is the name of this encoding in the kernels, for backends that rotate, round and pack in one call; None
    if no kernel has this encoding.
    """

    method: ClassVar[str | None] = None

    @abstractmethod
    def format(self, dim: int, page_size: int, dtype: torch.dtype) -> SideFormat:
        """The format of a page of ``page_size`` vectors of width ``dim``, whose source dtype is ``dtype``.

        Raises:
            ValueError: if the codec cannot store vectors of that width or pages of that size.
        """

    @abstractmethod
    def encode(self, x: torch.Tensor) -> Encoded:
        """Encode float32 pages ``x [N, P, D]``, rotated and without their mean, as the format says."""


class Codec:
    """How a page is stored: a side codec for keys and one for values.

    Subclasses set the class attributes, take ``(key_bits, value_bits, **options)`` and set ``keys`` and ``values``.
    """

    #: Registered name; bits may follow it in a spec: ``"kvarn3"``.
    name: ClassVar[str]
    #: Bits that exist; ``()`` where the codec has no choice of bits.
    supported_bits: ClassVar[tuple[int, ...]] = ()
    #: Bits used when none are asked for.
    default_bits: ClassVar[int | None] = None

    keys: SideCodec
    values: SideCodec
    #: The arguments by which the registry made the codec; None for one that was made otherwise.
    arguments: dict[str, Any] | None = None

    def __init__(self, key_bits: int | None = None, value_bits: int | None = None) -> None:
        self.key_bits = check_bits(self, "key_bits", key_bits)
        self.value_bits = check_bits(self, "value_bits", value_bits)

    def of_layer(self, index: int) -> Codec:
        """The codec of the layer ``index`` of a cache: this one, unless layers have codecs of their own."""
        return self

    def all(self) -> list[Codec]:
        """The codecs of all layers, each once."""
        return [self]

    def __repr__(self) -> str:
        bits = "" if not self.supported_bits else f"(key_bits={self.key_bits}, value_bits={self.value_bits})"
        return f"{self.name}{bits}"


def side_format(side: SideCodec, dim: int, page_size: int, dtype: torch.dtype) -> SideFormat:
    """The format of vectors of width ``dim``. Vectors of width 0 (no rotary keys) are not encoded by ``side``."""
    if dim == 0:
        return SideFormat(0, 8 * dtype.itemsize, level="dense", zero=False, dense_dtype=dtype)
    return side.format(dim, page_size, dtype)


def check_bits(codec: Codec, argument: str, bits: int | None) -> int | None:
    """``bits`` or the codec's default; raises ValueError where the codec has no such width."""
    if bits is None:
        return codec.default_bits
    if bits not in codec.supported_bits:
        accepted = ", ".join(map(str, codec.supported_bits)) or "none: its width is fixed"
        raise ValueError(f"{argument}={bits!r} is not a width of codec {codec.name!r}; accepted: {accepted}")
    return bits


def check_divides(argument: str, group: int, whole: int, what: str) -> None:
    """Raise ValueError unless ``group`` divides ``whole``."""
    if isinstance(group, bool) or not isinstance(group, int) or group < 1 or whole % group:
        divisors = [d for d in range(1, whole + 1) if whole % d == 0]
        raise ValueError(f"{argument}={group!r} does not divide {what}={whole}; accepted: {divisors}")


def check_packable(bits: int, dim: int) -> None:
    """Raise ValueError if rows of ``dim`` codes of ``bits`` bits do not fill whole bytes in every bit plane."""
    if bits != 8 and dim % 8:
        raise ValueError(f"head_dim={dim} cannot be packed at {bits} bits; accepted: multiples of 8 (or 8 bits)")


def asymmetric(x: torch.Tensor, dims: tuple[int, ...], bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round-to-nearest integer codes with a scale and a zero point shared over ``dims`` (KIVI, arXiv:2402.02750).

    The zero point is rounded to half precision before the scale is chosen, and both are rounded before the codes are
    chosen, so that the codes absorb the rounding errors.

    Args:
        x: float32, any shape.
        dims: the dimensions over which a scale is shared.
        bits: width of a code.

    Returns:
        Codes (uint8, shape of ``x``), scale and zero (half precision, ``dims`` kept as size 1).
    """
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    zero = round_scale(low)
    scale = round_scale(((high - zero.float()) / (2**bits - 1)).clamp_min(_SCALE_MIN))
    codes = ((x - zero.float()) / scale.float()).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, zero


def round_scale(scale: torch.Tensor) -> torch.Tensor:
    """``scale`` in the dtype of stored scales. Values beyond its range become its largest number."""
    return scale.clamp(-_SCALE_MAX, _SCALE_MAX).to(SCALE_DTYPE)
