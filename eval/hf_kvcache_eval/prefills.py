"""A prompt is prefilled once for all caches.

What a prefill computes does not depend on the cache: its tokens attend to each other in full precision, and only then
is anything compressed. So its keys and values are kept, and every further cache takes them in layer by layer, as it
would from the model. That is most of a comparison's time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_kvcache.layer import KVCacheLayer

#: Beyond this the oldest prefills are forgotten.
_LIMIT_BYTES = 3 * 2**30

Contexts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Prefill:
    """A prefilled batch.

    Attributes:
        mask: ``[B, T]``, 0 for left padding.
        logits: after the last token, ``[B, vocabulary]``.
        states: each layer's keys and values, ``[B, Hkv, T, D]``.
    """

    mask: torch.Tensor
    logits: torch.Tensor
    states: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(side.numel() * side.element_size() for pair in self.states for side in pair)

    def row(self, index: int) -> Prefill:
        """One sequence without its padding; its tensors are views."""
        start = int((self.mask[index] == 0).sum())
        rows = slice(index, index + 1)
        states = [(keys[rows, :, start:], values[rows, :, start:]) for keys, values in self.states]
        return Prefill(self.mask[rows, start:], self.logits[rows], states)

    def into(self, cache: Any) -> None:
        """Give ``cache``, which is empty, what the model's prefill would have given it."""
        mask = None if bool(self.mask.all()) else self.mask
        for index, (keys, values) in enumerate(self.states):
            cache.update(_as_projected(keys), _as_projected(values), index)
            layer = cache.layers[index]
            if isinstance(layer, KVCacheLayer):
                # The attention of a prefill is full attention, after which the layer packs.
                layer.note_attended(mask, keys.shape[2])


class Prefills:
    """The prefills kept, the newest last.

    Args:
        limit_bytes: of keys and values; the newest is kept whatever its size.
    """

    def __init__(self, limit_bytes: int = _LIMIT_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._kept: OrderedDict[Any, Prefill] = OrderedDict()

    def find(self, model: Any, contexts: Contexts) -> Prefill | None:
        """The prefill of these contexts by this model: of just this batch, or of a batch that one context was in."""
        key = _key(model, contexts)
        if key in self._kept:
            return self._kept[key]
        if len(contexts) != 1:
            return None
        for (prefiller, batch), kept in self._kept.items():
            if prefiller is model and key[1][0] in batch:
                return kept.row(batch.index(key[1][0]))
        return None

    def keep(self, model: Any, contexts: Contexts, cache: Any, mask: torch.Tensor, logits: torch.Tensor) -> None:
        """Keep what the model's prefill left in ``cache``, a DynamicCache; other caches leave nothing behind."""
        if not _is_plain(cache):
            return
        states = [(layer.keys, layer.values) for layer in cache.layers]
        self._kept[_key(model, contexts)] = Prefill(mask, logits, states)
        while len(self._kept) > 1 and sum(kept.bytes for kept in self._kept.values()) > self.limit_bytes:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()


def can_share(config: Any, cache: Any) -> bool:
    """Whether ``cache`` can take in a kept prefill: every layer holds the keys and values of all tokens of its own."""
    plain = _is_plain(DynamicCache(config=config))
    own = [layer for layer in cache.layers if isinstance(layer, KVCacheLayer)]
    return plain and not any(layer.options.deferred for layer in own)


def _is_plain(cache: Any) -> bool:
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def _as_projected(states: torch.Tensor) -> torch.Tensor:
    """A copy of ``[B, Hkv, T, D]``, since a cache may keep what it is given and change it.

    In memory it lies token by token, as a projection's output does, so that sums over it are those of a real prefill.
    """
    return states.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _key(model: Any, contexts: Contexts) -> tuple[Any, tuple[tuple[int, ...], ...]]:
    # The model itself: the id of one that is gone may be another's.
    return model, tuple(tuple(context) for context in contexts)
