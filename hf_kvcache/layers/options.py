"""The settings that all layers of a cache share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from transformers import PreTrainedConfig

from hf_kvcache.codecs.base import Codec
from hf_kvcache.codecs.latent import LatentCodec, latent_codec
from hf_kvcache.codecs.registry import resolve
from hf_kvcache.eviction.options import EvictionOptions
from hf_kvcache.lowrank.projection import LayerProjection
from hf_kvcache.sparse.reader import SparseOptions
from hf_kvcache.storage.offload import OffloadTarget


@dataclass(frozen=True)
class CompressedOptions:
    """How the layers of a model that compresses its tokens (DeepSeek V4) hold them.

    Attributes:
        bits: bits of compressed entries: 8, 4, or None to hold them as they are.
        window_bits: bits of the newest tokens, likewise.
        width: width of a token, and of an entry.
        rotary: rotary channels at its end.
    """

    bits: int | None
    window_bits: int | None
    width: int
    rotary: int

    @property
    def entries(self) -> LatentCodec | None:
        """How entries are packed."""
        return self._codec(self.bits)

    @property
    def window(self) -> LatentCodec | None:
        """How the newest tokens are packed."""
        return self._codec(self.window_bits)

    @property
    def index(self) -> LatentCodec | None:
        """How the entries of an indexer are packed: in 8 bits with a scale each, because all of them are compared."""
        return None if self.bits is None else LatentCodec(resolve("int8"), None)

    def _codec(self, bits: int | None) -> LatentCodec | None:
        return None if bits is None else latent_codec(None, bits, None, [self.width - self.rotary], {})


@dataclass(frozen=True)
class LayerOptions:
    """The settings that all layers of a cache share.

    Attributes:
        codec: how pages are stored; of a cache with mixed precision, of all layers together.
        sink_length: number of tokens at the start of a sequence that stay in full precision.
        tail_length: number of newest tokens that stay in full precision.
        page_size: number of tokens in a page.
        validate: whether every update is checked for NaN and infinity.
        deferred: whether new tokens are stored at the next call and not after attention, because other layers read them
            too.
        eviction: the settings of eviction in full-attention layers; None if these keep every token.
        latents: ``"native"`` if the model caches latents itself, or the low-rank bases of each layer by its number;
            None if pages hold keys and values.
        sparse: how decode steps of full-attention layers read; None if they read everything.
        max_length: number of tokens that a sequence can have, if all memory is allocated at once; None if it grows.
        offload: where pages lie outside of the device; None if they lie on it.
        compressed: how the layers of a model that compresses its tokens hold them; None for other models.
        config: the model's config. Errors name caches that work with it.
    """

    codec: Codec
    sink_length: int
    tail_length: int
    page_size: int
    validate: bool
    deferred: bool
    eviction: EvictionOptions | None = None
    latents: Literal["native"] | dict[int, LayerProjection] | None = None
    sparse: SparseOptions | None = None
    max_length: int | None = None
    offload: OffloadTarget | None = field(default=None, compare=False)
    compressed: CompressedOptions | None = None
    config: PreTrainedConfig | None = field(default=None, repr=False, compare=False)

    def of_layer(self, index: int) -> LayerOptions:
        """The settings of one layer, whose codec may be its own."""
        codec = self.codec.of_layer(index)
        return self if codec is self.codec else replace(self, codec=codec)

    @property
    def takes_padding(self) -> bool:
        """Whether batches may be padded: not where the model compresses tokens, which it does without a mask."""
        return self.compressed is None
