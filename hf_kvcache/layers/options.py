"""The settings that all layers of a cache share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedConfig

from hf_kvcache.codecs.base import Codec
from hf_kvcache.eviction.options import EvictionOptions
from hf_kvcache.lowrank.projection import LayerProjection
from hf_kvcache.sparse.reader import SparseOptions


@dataclass(frozen=True)
class LayerOptions:
    """The settings that all layers of a cache share.

    Attributes:
        codec: how pages are stored.
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
    config: PreTrainedConfig | None = field(default=None, repr=False, compare=False)
