"""What layers that evict hold after a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_kvcache.cache.memory import layer_report
from hf_kvcache.layers.evicting import EvictingLayer
from hf_kvcache.planning.evicting import fill, widest_split
from hf_kvcache.planning.held import Held
from hf_kvcache.planning.model import LayerCall, NotTold, Shape
from hf_kvcache.storage import PagedStorage

#: Tokens of each head.
Split = tuple[int, ...]
#: Bytes of a position.
_POSITION = 8


class Evicted:
    """What the evicting layers of one kind of cache hold of one sequence.

    What is held is computed by real storages for a page of kept tokens or two; each further page adds as much. Where
    heads compete for tokens it is the most that can be held.

    Args:
        calls: what the model gives to each layer in a forward pass.
        queries: the queries that read each layer, by its index.
    """

    def __init__(self, calls: Sequence[tuple[LayerCall, ...]], queries: Mapping[int, Shape]) -> None:
        self._calls, self._queries = calls, queries
        self._after: dict[Any, tuple[Held, int]] = {}
        self._before: dict[Any, int] = {}

    def held(self, layer: EvictingLayer, place: int, tokens: int, split: Split | None) -> Held:
        """What a layer holds after a prompt of one sequence; the peak is of this layer alone.

        Args:
            layer: the layer.
            place: its place in the cache.
            tokens: tokens of the prompt.
            split: the tokens of each head that leave the dense buffer; None if the layer's budget says it.
        """
        kept, compete = kept_tokens(layer, tokens), split is not None or _uneven(layer)
        page, dense, short = layer.options.page_size, dense_tokens(layer), min(tokens, _longest(layer))
        if kept >= tokens:
            after, pages = self._simulated(layer, place, tokens, kept, split)
        elif compete:
            # A head can hold what all heads keep, of a prompt that is longer.
            most = kept * self.heads(place) if split is None else dense + max(split)
            after, pages = self._simulated(layer, place, min(tokens, most + _longest(layer)), kept, split)
        else:
            # Whole pages that are left out, each of which adds as much.
            out = max(kept - dense - page, 0) // page
            some = kept - out * page
            after, pages = self._simulated(layer, place, short, some, None)
            if out:
                more, more_pages = self._simulated(layer, place, short, some + page, None)
                pages += out * (more_pages - pages)
                after += (more - after) * out
            newest = max(layer.eviction.policy.recent(kept) - layer.options.tail_length, 0)
            apart = pages_apart(kept - dense, newest, tokens - dense, page)
            after += Held(self.heads(place) * apart * page * _POSITION, 0, 0)
        before = self._reading(layer, place, tokens)
        return Held(after.total, after.read, max(after.total, before + (0 if rereads(layer) else pages)))

    def splits(self, layers: Sequence[Any], tokens: int) -> dict[int, Split]:
        """Tokens of each head that leave the dense buffer, by layer, where the heads of all layers compete."""
        slots = [
            (head, place)
            for place, layer in enumerate(layers)
            if isinstance(layer, EvictingLayer) and layer.eviction.policy.across_layers
            for head in range(self.heads(place))
        ]
        if not slots:
            return {}
        layer = layers[slots[0][1]]
        dense, kept = dense_tokens(layer), kept_tokens(layer, tokens)
        if tokens <= kept:
            return {}
        leaving = widest_split((kept - dense) * len(slots), len(slots), tokens - dense, layer.options.page_size)
        # A table is as wide as its longest row: one head of every layer is filled before the next.
        found: dict[int, list[int]] = {}
        for (_, place), count in zip(sorted(slots), leaving.tolist(), strict=True):
            found.setdefault(place, []).append(count)
        return {place: tuple(counts) for place, counts in found.items()}

    def heads(self, place: int) -> int:
        """KV heads of a layer."""
        return self._calls[place][0].arguments[0].sizes(1, 1)[1]

    def _simulated(
        self, layer: EvictingLayer, place: int, tokens: int, kept: int, split: Split | None
    ) -> tuple[Held, int]:
        """What a layer holds of a prompt that it is given token by token, and the bytes of its pages."""
        kind = type(layer), repr(self._calls[place]), tokens, kept, split
        if kind not in self._after:
            layer.reset()
            evictor = fill(layer, self._calls[place], self._query(layer), tokens, kept)
            storage = layer.storage
            assert storage is not None
            if evictor.schedule.waits and split is not None:
                evictor.compress(storage, np.array(split), tokens)
            elif evictor.schedule.waits:
                evictor.evict(storage, np.zeros(1, np.int64), tokens)
            parts = layer_report(layer).parts
            lost = kept < tokens or layer.eviction.policy.keeps_above is not None
            if lost and (split is not None or _uneven(layer)):
                parts["tables"] += _uncertain(storage)
            # Of what is remembered of queries, a step reads sums of attention only.
            not_read = () if layer.eviction.policy.needs_accumulated else ("other",)
            self._after[kind] = Held.of(parts, *not_read), storage.pool.held_pages * storage.layout.record_bytes
        return self._after[kind]

    def _reading(self, layer: EvictingLayer, place: int, tokens: int) -> int:
        """Bytes that a layer holds when it has attended and dropped nothing yet; they grow with every token."""
        few = min(tokens, _longest(layer))
        sizes = [self._filled(layer, place, n) for n in {few, few + (tokens > few)}]
        return sizes[0] + (tokens - few) * (max(sizes) - min(sizes))

    def _filled(self, layer: EvictingLayer, place: int, tokens: int) -> int:
        kind = type(layer), repr(self._calls[place]), tokens
        if kind not in self._before:
            layer.reset()
            evictor = fill(layer, self._calls[place], self._query(layer), tokens, None)
            assert layer.storage is not None
            self._before[kind] = evictor.held(layer.storage)
        return self._before[kind]

    def _query(self, layer: EvictingLayer) -> Shape:
        known = self._queries.get(layer.index)
        if known is None:
            raise NotTold(
                f"layer {layer.index}: the model does not pass on to attention what the cache returns, and an evicting "
                "cache needs its queries"
            )
        return known


def dense_tokens(layer: EvictingLayer) -> int:
    """Tokens of a head that stay in full precision: sinks and tail."""
    return layer.options.sink_length + layer.options.tail_length


def kept_tokens(layer: EvictingLayer, tokens: int) -> int:
    """Tokens that a head keeps on average, of a sequence of so many."""
    budget, place = layer.eviction.budget, layer.place
    quota = layer.eviction.policy.layer_quota(
        budget.tokens(tokens), place.evicting_index, place.num_evicting, budget.least, tokens
    )
    return max(quota, dense_tokens(layer))


def _uneven(layer: EvictingLayer) -> bool:
    """Whether the heads of a layer keep different numbers of tokens."""
    return layer.eviction.policy.head_floor is not None or layer.eviction.policy.keeps_above is not None


def _longest(layer: EvictingLayer) -> int:
    """Tokens of the longest prompt that is given to a storage where a few pages are kept of it.

    It is longer than what the dense buffer has room for, which it allocates for long prompts alone.
    """
    return 2 * (dense_tokens(layer) + (layer.eviction.interval or 0) + 2 * layer.options.page_size)


def rereads(layer: EvictingLayer) -> bool:
    """Whether ``compress()`` reads the prompt again, on a copy."""
    return layer.eviction.policy.needs_replay


def waits(layer: EvictingLayer) -> bool:
    """Whether nothing is dropped before ``compress()``."""
    return layer.eviction.policy.waits


def pages_apart(count: int, newest: int, free: int, page: int) -> int:
    """The most pages of a head that can hold tokens which do not stand side by side, so that it stores their positions.

    Args:
        count: tokens in pages.
        newest: how many of them, at most, are the last ones, side by side.
        free: tokens among which they were chosen.
        page: tokens of a page.
    """
    # A token is missing behind the first of a page, if that one was chosen and another is behind it.
    chosen = min(count - min(newest, count), count - 1)
    return min(-(-max(chosen, 0) // page), free - count)


def _uncertain(storage: PagedStorage) -> int:
    """Bytes by which a layer can hold more than the split with the most pages, where heads keep different numbers.

    Any of these pages may store positions, and a head may have one page more than in that split.
    """
    table = storage.table
    columns = (table.nbytes - table.lengths.nbytes) // max(table.columns, 1)
    return len(table.page_ids()) * storage.page_size * _POSITION + columns
