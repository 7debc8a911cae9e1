"""A prefill that is run once and taken in by several caches.

What a prefill computes does not depend on the cache: its tokens attend to each other in full precision, and only then
is anything compressed. So what each layer was given is written down, and other caches take it in layer by layer, as
they would from the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from hf_kvcache.cache.base import KVCache
from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.integration.binding import IMPLEMENTATION, bind, unbind
from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.layers.base import KVCacheLayer


@dataclass(frozen=True)
class LayerStates:
    """What a prefill computed in one layer.

    Attributes:
        keys: ``[B, Hkv, T, Dk]``, after rotary positions.
        values: ``[B, Hkv, T, Dv]``.
        queries: ``[B, Hq, T, Dk]``, after rotary positions, not scaled; None where they were not asked for.
        scoring: how queries are scored against keys.
        module: the attention module.
    """

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor | None = None
    scoring: Scoring | None = None
    module: torch.nn.Module | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the tensors."""
        sides = [side for side in (self.keys, self.values, self.queries) if side is not None]
        return sum(side.numel() * side.element_size() for side in sides)

    def call(self, mask: torch.Tensor | None) -> AttentionCall:
        """The call of attention that these were given to, under ``mask``."""
        scoring = Scoring(self.keys.shape[3] ** -0.5) if self.scoring is None else self.scoring
        return AttentionCall(self.queries, mask, scoring, module=self.module, length=self.keys.shape[2])

    def row(self, row: slice, start: int) -> LayerStates:
        """One sequence from token ``start`` on; views."""
        queries = None if self.queries is None else self.queries[row, :, start:]
        return LayerStates(self.keys[row, :, start:], self.values[row, :, start:], queries, self.scoring, self.module)


class RecordingLayer(KVCacheLayer):
    """Keeps what attention gives it, and stores nothing."""

    with_queries = False
    _queries: tuple[torch.Tensor, Scoring | None, torch.nn.Module | None] | None = None

    def note_attended(self, call: AttentionCall) -> None:
        """Keep a copy of the queries: they may be a view of something larger."""
        if self.with_queries and call.query is not None:
            self._queries = call.query.detach().clone(), call.scoring, call.module

    @property
    def states(self) -> LayerStates:
        """What the layer was given, copied."""
        keys, values = (side.clone() for side in self.new_tokens())
        return LayerStates(keys, values, *(self._queries or ()))


class Recording:
    """A context in which ``cache`` can take in one prefill of a model of ``config``.

    The config is bound to this package's attention for that time, as when a KVCache prefills.

    Args:
        config: the model's.
        queries: whether to keep the queries.
    """

    def __init__(self, config: PreTrainedConfig, queries: bool) -> None:
        self.config: Any = config.get_text_config(decoder=True)
        self.cache = KVCache(config, bind=False)
        self._layers = [RecordingLayer(index, self.cache.options) for index in range(len(self.cache.layers))]
        for layer in self._layers:
            layer.with_queries = queries
        self.cache.layers = list(self._layers)

    def __enter__(self) -> Recording:
        self._was_bound = self.config._attn_implementation == IMPLEMENTATION
        bind(self.config)
        return self

    def __exit__(self, *error: object) -> None:
        if not self._was_bound:
            unbind(self.config)

    @property
    def states(self) -> list[LayerStates]:
        """What each layer was given."""
        return [layer.states for layer in self._layers]


def can_take_in(config: Any, cache: Any) -> bool:
    """Whether ``cache`` can take in a prefill: every layer holds the keys and values of all tokens of its own.

    Args:
        config: of the model.
        cache: an empty cache for it.
    """
    plain = DynamicCache(config=config)
    if type(plain) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in plain.layers):
        return False
    own = [layer for layer in cache.layers if isinstance(layer, KVCacheLayer)]
    return not any(layer.options.deferred for layer in own)


def take_in(cache: Any, states: list[LayerStates], mask: torch.Tensor | None = None) -> None:
    """Give ``cache``, which is empty, what the model's prefill would have given it.

    Args:
        cache: of this package, or transformers' own.
        states: what each layer was given.
        mask: ``[B, T]``, 0 for left padding; None if there is none.
    """
    for index, of_layer in enumerate(states):
        cache.update(_as_projected(of_layer.keys), _as_projected(of_layer.values), index)
        layer = cache.layers[index]
        if isinstance(layer, KVCacheLayer):
            # The attention of a prefill is full attention, after which the layer packs.
            layer.note_attended(of_layer.call(mask))


def _as_projected(states: torch.Tensor) -> torch.Tensor:
    """A copy of ``[B, Hkv, T, D]``, since a cache may keep what it is given and change it.

    In memory it lies token by token, as a projection's output does, so that sums over it are those of a real prefill.
    """
    return states.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
