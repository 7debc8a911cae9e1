"""The bytes that a cache holds after a prompt, by the arithmetic of the cache itself on the ``meta`` device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.cache_utils import Cache

from hf_kvcache.cache.memory import layer_report
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.evicting import EvictingLayer
from hf_kvcache.layers.low_rank import LowRankLayer
from hf_kvcache.planning.evicting import fill, widest_split
from hf_kvcache.planning.model import LayerCall, NotTold, Shape

#: Parts of a report that a decode step does not read.
_NOT_READ = ("tables", "slack")


@dataclass(frozen=True)
class Held:
    """Bytes of a cache, or of some of its layers.

    Attributes:
        total: bytes held after the prompt: ``cache.memory().total``.
        read: those among them that the next decode step reads.
        peak: the most bytes held at any time while the prompt is read.
    """

    total: int
    read: int
    peak: int

    def __add__(self, later: Held) -> Held:
        """Both together; the ``later`` layers read the prompt when these have."""
        return Held(self.total + later.total, self.read + later.read, max(self.peak, self.total + later.peak))

    def __mul__(self, sequences: int) -> Held:
        return Held(self.total * sequences, self.read * sequences, self.peak * sequences)


_NOTHING = Held(0, 0, 0)
#: Tokens of each head.
Split = tuple[int, ...]


class Holding:
    """The bytes of one kind of cache for any batch and length.

    Args:
        make: makes an empty cache.
        calls: what the model gives to each of its layers in a forward pass.
        queries: the queries that read each layer, by its index; only needed for layers that evict.
        fill: the cache after a pass of so many sequences and tokens, for layers of transformers' own that repeated
            calls do not fill as a pass would; None if there are none.
    """

    def __init__(
        self,
        make: Callable[[], Cache],
        calls: list[tuple[LayerCall, ...]],
        queries: Mapping[int, Shape],
        fill: Callable[[int, int], Cache] | None = None,
    ) -> None:
        self._make, self._calls, self._queries, self._fill = make, calls, queries, fill
        self._known: dict[tuple[int, int], Held] = {}
        self._simulations: dict[Any, Held] = {}

    def bytes(self, batch: int, tokens: int) -> Held:
        """Bytes after a prompt of ``tokens`` tokens of each of ``batch`` sequences, read in one forward pass.

        A cache that waits for ``compress()`` has compressed then.
        """
        size = batch, tokens
        if size not in self._known:
            self._known[size] = self._find(batch, tokens)
        return self._known[size]

    def _find(self, batch: int, tokens: int) -> Held:
        total, alike, prompt, kept = _NOTHING, dict[Any, Held](), 0, 0
        filled = None if self._fill is None else self._fill(batch, tokens).layers
        layers = self._make().layers
        splits = self._splits(layers, tokens)
        for index, (layer, calls) in enumerate(zip(layers, self._calls, strict=True)):
            if filled is not None and not isinstance(layer, KVCacheLayer):
                total += _held_by(filled[index])
            elif isinstance(layer, EvictingLayer):
                held = self._evicted(layer, calls, tokens, splits.get(index)) * batch
                if _waits(layer):
                    prompt, kept = prompt + held.peak, kept + held.total
                total += held
            else:
                kind = type(layer), getattr(layer, "sliding_window", None), _ranks(layer), repr(calls)
                if kind not in alike:
                    for call in calls:
                        call.repeat(layer, batch, _as_many_held(layer, calls, tokens))
                    alike[kind] = _held_by(layer)
                total += alike[kind]
        if prompt:
            # Nothing is dropped before compress(), which reads again on a copy of the whole prompt.
            total = Held(total.total, total.read, total.total - kept + 2 * prompt)
        return total

    def _evicted(self, layer: EvictingLayer, calls: tuple[LayerCall, ...], tokens: int, split: Split | None) -> Held:
        """What a layer that evicts holds of one sequence.

        Of a long prompt that depends on how many tokens are kept, and on nothing else; so a short one is planned.
        """
        kept, heads = _kept(layer, tokens), calls[0].arguments[0].sizes(1, 1)[1]
        page, interval = layer.options.page_size, layer.eviction.interval
        most = kept if layer.eviction.policy.head_floor is None else kept * heads
        if split is not None:
            most = max(split) + layer.options.sink_length + layer.options.tail_length
        usual = layer.options.sink_length + layer.options.tail_length + (interval or page)
        # A dropped token for every page, and more tokens than the buffer usually has room for.
        enough = max(most + most // page + 2, 2 * usual + 16)
        short = min(tokens, enough)
        held = self._simulated(layer, calls, short, kept, split)
        if short == tokens:
            return held
        # What is held until tokens are dropped grows with every token.
        growth = held.peak - self._simulated(layer, calls, short - 1, kept, split).peak
        return Held(held.total, held.read, held.peak + growth * (tokens - short))

    def _simulated(
        self, layer: EvictingLayer, calls: tuple[LayerCall, ...], tokens: int, kept: int, split: Split | None
    ) -> Held:
        kind = type(layer), repr(calls), tokens, kept, split
        if kind not in self._simulations:
            layer.reset()
            evictor = fill(layer, calls, self._query(layer, calls), tokens, kept)
            storage = layer.storage
            assert storage is not None
            if evictor.schedule.waits and split is not None:
                evictor.compress(storage, np.array(split), tokens)
            elif evictor.schedule.waits:
                evictor.evict(storage, np.zeros(1, np.int64), tokens)
            parts = layer_report(layer).parts
            total = sum(parts.values())
            not_read = _NOT_READ if layer.eviction.policy.needs_accumulated else (*_NOT_READ, "other")
            peak = evictor.before + (0 if _waits(layer) else storage.pool.held_pages * storage.layout.record_bytes)
            self._simulations[kind] = Held(total, total - sum(parts[name] for name in not_read), max(peak, total))
        return self._simulations[kind]

    def _query(self, layer: EvictingLayer, calls: tuple[LayerCall, ...]) -> Shape:
        """The queries that read a layer. Layers that run again (Dory) are read as the first time."""
        known = self._queries.get(layer.index)
        if known is None:
            raise NotTold(f"layer {layer.index}: no attention over what it is given was seen on the meta device")
        return known

    def _splits(self, layers: Sequence[Any], tokens: int) -> dict[int, Split]:
        """Tokens that move into pages in each head, by layer, where the heads of all layers compete."""
        slots = [
            (head, index)
            for index, layer in enumerate(layers)
            if isinstance(layer, EvictingLayer) and layer.eviction.policy.across_layers
            for head in range(self._calls[index][0].arguments[0].sizes(1, 1)[1])
        ]
        if not slots:
            return {}
        layer = layers[slots[0][1]]
        dense, kept = layer.options.sink_length + layer.options.tail_length, _kept(layer, tokens)
        if tokens <= kept:
            return {}
        held = widest_split((kept - dense) * len(slots), len(slots), tokens - dense, layer.options.page_size)
        # A table is as wide as its longest row: one head of every layer is filled before the next.
        found: dict[int, list[int]] = {}
        for (_, index), count in zip(sorted(slots), held.tolist(), strict=True):
            found.setdefault(index, []).append(count)
        return {index: tuple(counts) for index, counts in found.items()}


def _kept(layer: EvictingLayer, tokens: int) -> int:
    """Tokens that a head keeps on average, of a sequence of so many."""
    budget, place = layer.eviction.budget, layer.place
    quota = layer.eviction.policy.layer_quota(
        budget.tokens(tokens), place.evicting_index, place.num_evicting, budget.least, tokens
    )
    return max(quota, layer.options.sink_length + layer.options.tail_length)


def _waits(layer: EvictingLayer) -> bool:
    """Whether nothing is dropped before ``compress()``."""
    return layer.eviction.policy.needs_replay


def _ranks(layer: Any) -> tuple[int, int, int] | None:
    """The numbers of coefficients, and of groups of heads that have some; None without a basis."""
    if not isinstance(layer, LowRankLayer):
        return None
    return layer.projection.keys.rank, layer.projection.values.rank, layer.projection.groups


def _as_many_held(layer: Any, calls: tuple[LayerCall, ...], tokens: int) -> int:
    """A number of tokens after which a layer holds what it holds after ``tokens``, and not much more than its window.

    What a layer with a window holds of a long prompt depends on where the prompt ends in a page, and on nothing else.
    """
    plain = isinstance(layer, KVCacheLayer) and [call.method for call in calls] == ["update"]
    if not plain or layer.sliding_window is None:
        return tokens
    page = layer.options.page_size
    enough = layer.sliding_window + layer.options.tail_length + 2 * page
    return min(tokens, enough + (tokens - enough) % page)


def _held_by(layer: Any) -> Held:
    if isinstance(layer, KVCacheLayer):
        layer.flush()
    parts = layer_report(layer).parts
    total = sum(parts.values())
    return Held(total, total - sum(parts[name] for name in _NOT_READ), total)
