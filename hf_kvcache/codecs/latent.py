"""The codec of latent pages: one side codec for latents, one for the rotary keys beside them."""

from __future__ import annotations

from typing import Any

from hf_kvcache.codecs.base import Codec
from hf_kvcache.codecs.bf16 import BFloat16Side
from hf_kvcache.codecs.none import DenseSide
from hf_kvcache.codecs.registry import resolve

#: Codecs of latents by bits: 8 are plenty in any form; with 4, a scale for every 32 channels is what keeps the error of
#: attention below a tenth (README).
BY_BITS: dict[int, tuple[str, dict[str, Any]]] = {8: ("rotated", {}), 4: ("rotated", {"group_size": 32})}


class LatentCodec(Codec):
    """Stores latents as another codec stores values: token by token, since they are values too.

    Args:
        latents: codec whose side for values stores the latents.
        rotary: codec whose side for values stores the rotary keys; None for 16 bits, or for what the model gives where
            the latents stay dense.
    """

    name = "latent"

    def __init__(self, latents: Codec, rotary: Codec | None) -> None:
        super().__init__()
        self.latents, self.rotary = latents, rotary
        self.keys = latents.values
        dense = isinstance(self.keys, DenseSide)
        self.values = rotary.values if rotary is not None else self.keys if dense else BFloat16Side()

    def __repr__(self) -> str:
        return f"latent({self.latents!r}, rotary={self.rotary!r})"


def latent_codec(
    codec: str | Codec | None, bits: int | None, rotary_codec: str | Codec | None, options: dict[str, Any]
) -> LatentCodec:
    """The codec of latent pages from what a user says.

    Raises:
        ValueError: naming the argument, its value and the accepted ones.
    """
    rotary = None if rotary_codec is None else resolve(rotary_codec)
    if codec is None and bits is not None:
        if bits not in BY_BITS:
            raise ValueError(f"bits={bits!r} is no width of latents; accepted: {sorted(BY_BITS)}, or a codec by name")
        codec, own = BY_BITS[bits]
        options = own | options
    return LatentCodec(resolve("none" if codec is None else codec, bits=bits, **options), rotary)
