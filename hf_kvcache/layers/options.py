"""What the layers of a cache share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedConfig

from hf_kvcache.codecs.base import Codec
from hf_kvcache.eviction.options import EvictionOptions
from hf_kvcache.lowrank.projection import LayerProjection


@dataclass(frozen=True)
class LayerOptions:
    """What every layer of a cache shares.

    Attributes:
        codec: how pages are stored.
        sink_length: tokens at the start of a sequence that stay in full precision.
        tail_length: newest tokens that stay in full precision.
        page_size: tokens a page holds.
        validate: whether every update is checked for NaN and infinity.
        deferred: whether new tokens are stored at the next call only, because other layers read them too.
        eviction: how full-attention layers keep within a budget; None: they keep every token.
        latents: ``"native"`` where the model caches latents itself, or the basis of each layer by its number; None:
            keys and values are stored as they are.
        config: of the model, for errors that say what would work with it.
    """

    codec: Codec
    sink_length: int
    tail_length: int
    page_size: int
    validate: bool
    deferred: bool
    eviction: EvictionOptions | None = None
    latents: Literal["native"] | dict[int, LayerProjection] | None = None
    config: PreTrainedConfig | None = field(default=None, repr=False, compare=False)
