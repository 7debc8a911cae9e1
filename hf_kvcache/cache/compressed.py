"""``CompressedKVCache``: a cache for models that compress their tokens (DeepSeek V4)."""

from __future__ import annotations

from transformers import PreTrainedConfig

from hf_kvcache.cache.base import KVCache
from hf_kvcache.cache.compressed_config import compressed_options, compresses
from hf_kvcache.cache.model_config import decoder_config


class CompressedKVCache(KVCache):
    """A KV cache for DeepSeek V4, which attends to a window of tokens and to compressed entries of all tokens.

    Its layers hold the newest tokens, the rows of tokens that are not compressed yet, the entries, and the entries of
    the indexer that chooses which of the others a token attends to. All of this can be cropped, reordered, forked and
    saved. What the model adds is written behind what is held; nothing is concatenated.

    Entries are packed one by one when they come. The rotary channels at their end are kept in more bits, because only
    they say where an entry stands. The first forward pass reads tokens and entries as the model made them, every later
    one as they are held.

    The compressor of the model takes no mask. It would compress padding together with tokens, so a batch of prompts of
    different lengths is refused before anything is stored.

    transformers refuses prompt lookup and assisted decoding for this model, because its own cache cannot go back. Given
    this cache, ``generate`` allows both.

    Args:
        config: the model's config.
        bits: bits of the channels of an entry that have no position: 8, 4, or None to hold entries as they are.
        window_bits: bits of the newest tokens, likewise. There are few of them, and every token reads them. The default
            is 8 if ``bits`` is given, else None.
        validate: whether every update is checked for NaN and infinity.

    Raises:
        ValueError: for a model that does not compress its tokens, or an argument out of range.
        TypeError: if ``config`` is not a model's config.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        bits: int | None = None,
        *,
        window_bits: int | None = None,
        validate: bool = False,
    ) -> None:
        decoder = decoder_config(config)
        if not compresses(decoder):
            raise ValueError(
                f"config of {decoder.model_type!r}: its layers do not compress tokens; accepted: models of DeepSeek "
                "V4. QuantizedKVCache(config, bits=4) is for other models"
            )
        if window_bits is None and bits is not None:
            window_bits = 8
        self._begin(compressed_options(decoder, bits, window_bits, validate), True)
