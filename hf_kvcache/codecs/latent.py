"""The codec of pages of latents: one side codec for the latents, one for the rotary keys beside them."""

from __future__ import annotations

from collections.abc import Collection
from math import gcd
from typing import Any

from hf_kvcache.codecs.base import Codec
from hf_kvcache.codecs.best import LATENTS
from hf_kvcache.codecs.bf16 import BFloat16Side
from hf_kvcache.codecs.mixed import MixedCodec
from hf_kvcache.codecs.none import DenseSide
from hf_kvcache.codecs.registry import option_names, resolve

#: Channels of a 4-bit latent that share a scale. With fewer, scales cost more bytes than they save.
_GROUP = 64


class LatentCodec(Codec):
    """Stores latents as another codec stores values: with scales per token, since latents are values too.

    Args:
        latents: codec whose side for values stores the latents.
        rotary: codec whose side for values stores the rotary keys. None for bfloat16, or, if the latents stay dense,
            for the model's dtype.
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


def latent_option_names(codec: str | Codec | None, bits: int | None) -> list[str]:
    """The names of the ``options`` of :func:`latent_codec`."""
    if codec is None:
        codec = LATENTS[bits].codec if bits in LATENTS else "none"
    return option_names(codec)


def latent_codec(
    codec: str | Codec | None,
    bits: int | None,
    rotary_codec: str | Codec | None,
    ranks: Collection[int],
    options: dict[str, Any],
) -> LatentCodec:
    """The codec of pages of latents from the arguments of a user.

    Args:
        codec: codec of the latents. None for the best codec of ``bits``, or for ``"none"`` if there are no bits.
        bits: bits of the latents.
        rotary_codec: codec of the rotary keys; None for the one that :data:`~hf_kvcache.codecs.best.LATENTS` names.
        ranks: widths of the latents to be stored.
        options: options of the codec of the latents.

    Raises:
        ValueError: naming the argument, its value and the accepted ones.
    """
    rotary = None if rotary_codec is None else resolve(rotary_codec)
    if codec is not None or bits is None:
        return LatentCodec(resolve("none" if codec is None else codec, bits=bits, **options), rotary)
    if bits not in LATENTS:
        raise ValueError(f"bits={bits!r} is no width of latents; accepted: {sorted(LATENTS)}, or a codec by name")
    best = LATENTS[bits]
    if bits < 8:
        options = {"group_size": gcd(_GROUP, *ranks)} | options
    if rotary is None and best.rotary is not None:
        rotary = resolve(best.rotary)
    return LatentCodec(resolve(best.codec, bits=bits, **(best.options | options)), rotary)


def native_option_names(codec: str | Codec, widths: dict[str, int]) -> list[str]:
    """The names of the ``options`` of :func:`native_codec`, without the widths."""
    if codec == "auto":
        return latent_option_names(None, next(iter(widths.values()), 4))
    return latent_option_names(codec, None)


def native_codec(codec: str | Codec, options: dict[str, Any], ranks: Collection[int]) -> Codec:
    """The codec of pages of latents from the arguments of a cache of keys and values.

    Args:
        codec: the argument ``codec`` of such a cache.
        options: options of the codec, including ``bits``, or equal ``key_bits`` and ``value_bits``.
        ranks: widths of the latents to be stored.

    Raises:
        ValueError: naming the argument, its value and the accepted ones.
    """
    if isinstance(codec, LatentCodec | MixedCodec):
        return codec
    options = dict(options)
    widths = {options.pop(name, None) for name in ("bits", "key_bits", "value_bits")} - {None}
    if len(widths) > 1:
        raise ValueError(
            f"bits={sorted(widths)}: latents are keys and values in one; accepted: one width for both, or "
            "LatentKVCache(config, bits=..., rotary_codec=...)"
        )
    bits = widths.pop() if widths else None
    if codec == "auto":
        return latent_codec(None, 4 if bits is None else bits, None, ranks, options)
    return latent_codec(codec, bits, None, ranks, options)
