"""The bytes that a cache holds after a prompt, by the arithmetic of the cache itself on the ``meta`` device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers.cache_utils import Cache

from hf_kvcache.cache.memory import layer_report
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.evicting import EvictingLayer
from hf_kvcache.layers.low_rank import LowRankLayer
from hf_kvcache.layers.sparse import SparseLayer
from hf_kvcache.layers.static import StaticLayer
from hf_kvcache.planning import allocated, sparse
from hf_kvcache.planning.evicted import Evicted, rereads, waits
from hf_kvcache.planning.held import Held
from hf_kvcache.planning.model import LayerCall, Shape

_NOTHING = Held(0, 0, 0)


class Holding:
    """The bytes of one kind of cache for any batch and length.

    Args:
        make: makes an empty cache.
        calls: what the model gives to each of its layers in a forward pass.
        queries: the queries that read each layer, by its index; only needed for layers that evict, or choose what a
            step reads.
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
        self._evicted = Evicted(calls, queries)

    @property
    def longest(self) -> int | None:
        """The most tokens that a sequence can have; None if there is no such number."""
        return getattr(getattr(self._make(), "options", None), "max_length", None)

    def bytes(self, batch: int, tokens: int) -> Held:
        """Bytes after a prompt of ``tokens`` tokens of each of ``batch`` sequences, read in one forward pass.

        A cache that waits for ``compress()`` has compressed then.
        """
        size = batch, tokens
        if size not in self._known:
            self._known[size] = self._find(batch, tokens)
        return self._known[size]

    def _find(self, batch: int, tokens: int) -> Held:
        total, alike, prompt, kept, copies = _NOTHING, dict[Any, Held](), 0, 0, 1
        filled = None if self._fill is None else self._fill(batch, tokens).layers
        layers: list[Any] = self._make().layers
        splits = self._evicted.splits(layers, tokens)
        for index, (layer, calls) in enumerate(zip(layers, self._calls, strict=True)):
            if filled is not None and not isinstance(layer, KVCacheLayer):
                total += _held_by(filled[index])
            elif isinstance(layer, EvictingLayer):
                held = self._evicted.held(layer, index, tokens, splits.get(index)) * batch
                if waits(layer):
                    prompt, kept = prompt + held.peak, kept + held.total
                    copies += rereads(layer) and copies == 1
                total += held
            else:
                window, chooses = getattr(layer, "sliding_window", None), self._chooses(layer)
                codec = repr(getattr(getattr(layer, "options", None), "codec", None))
                kind = type(layer), window, codec, _ranks(layer), chooses, repr(calls)
                if kind not in alike:
                    held = _held_after(layer, calls, batch, tokens)
                    alike[kind] = held if chooses is None else sparse.with_choice(layer, held)
                total += alike[kind]
        if prompt:
            # Nothing is dropped before compress(). A policy that reads again does so on a copy of the whole prompt.
            total = Held(total.total, total.read, total.total - kept + copies * prompt)
        return total

    def _chooses(self, layer: Any) -> bool | None:
        """Whether a layer chooses what its steps read, or reads what another one chose; None if it reads everything.

        It does so where the model does not give attention what the cache returns.
        """
        sparse_reading = isinstance(layer, SparseLayer) and not layer.dense and layer.index in self._queries
        return layer.leader_index is None if sparse_reading else None


def _ranks(layer: Any) -> tuple[int, int, int] | None:
    """The numbers of coefficients, and of groups of heads that have some; None without a basis."""
    if not isinstance(layer, LowRankLayer):
        return None
    return layer.projection.keys.rank, layer.projection.values.rank, layer.projection.groups


def _held_after(layer: Any, calls: tuple[LayerCall, ...], batch: int, tokens: int) -> Held:
    """What an empty layer that evicts nothing holds after the calls of one forward pass."""
    growing = allocated.growing(layer) if isinstance(layer, StaticLayer) else layer
    for call in calls:
        call.repeat(growing, batch, _as_many_held(growing, calls, tokens))
    held = _held_by(growing)
    if isinstance(layer, StaticLayer):
        return allocated.held(layer, calls, batch, tokens, held)
    return held


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
    return Held.of(layer_report(layer).parts)
