"""``QuantizedKVCache``: a cache that stores keys and values in few bits."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from transformers import PreTrainedConfig

from hf_kvcache.cache.base import KVCache
from hf_kvcache.codecs import Codec
from hf_kvcache.codecs.layer_bits import Bits


class QuantizedKVCache(KVCache):
    """A KV cache that stores keys and values in few bits. For a model that caches latents it stores those in few bits.

    Args:
        config: the model's config.
        bits: bits per element, 1 to 4 or 8. The default is 4, or the bits in the name of the codec. For mixed
            precision: widths by layer, as in :class:`KVCache`.
        key_bits: bits of the keys in place of ``bits``.
        value_bits: bits of the values in place of ``bits``.
        codec: how pages are stored. ``"auto"`` takes the codec that was measured best for the given bits.
        skip_layers: layers that store tokens in full precision, by their index in the model; -1 is the last one.
        sink_length: as in :class:`KVCache`, like ``tail_length``, ``page_size``, ``validate``, ``bind``,
            ``max_length`` and ``offload``.
        **codec_options: options of the codec such as ``group_size``.

    Raises:
        ValueError: for a model that cannot have such a cache, or an argument out of range.
        TypeError: if ``config`` is not a model's config, or neither the cache nor the codec has an argument.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        bits: Bits | None = None,
        key_bits: int | None = None,
        value_bits: int | None = None,
        codec: str | Codec = "auto",
        *,
        skip_layers: Sequence[int] = (),
        sink_length: int = 4,
        tail_length: int = 128,
        page_size: int = 128,
        validate: bool = False,
        bind: bool = True,
        max_length: int | None = None,
        offload: str | PathLike[str] | None = None,
        **codec_options: Any,
    ) -> None:
        super().__init__(
            config,
            codec,
            sink_length=sink_length,
            tail_length=tail_length,
            page_size=page_size,
            validate=validate,
            bind=bind,
            bits=bits,
            key_bits=key_bits,
            value_bits=value_bits,
            skip_layers=skip_layers,
            max_length=max_length,
            offload=offload,
            **codec_options,
        )
