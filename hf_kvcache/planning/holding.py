"""The bytes that a cache holds after a prompt, by the arithmetic of the cache itself on the ``meta`` device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import Cache

from hf_kvcache.cache.memory import layer_report
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.planning.model import LayerCall

#: Parts of a report that a decode step does not read.
_NOT_READ = ("tables", "slack")


@dataclass(frozen=True)
class Held:
    """Bytes of a cache.

    Attributes:
        total: bytes that the cache holds: ``cache.memory().total``.
        read: those among them that the next decode step reads.
    """

    total: int
    read: int

    def __add__(self, other: Held) -> Held:
        return Held(self.total + other.total, self.read + other.read)


class Holding:
    """The bytes of one kind of cache for any batch and length.

    Args:
        make: makes an empty cache.
        calls: what the model gives to each of its layers in a forward pass.
        fill: the cache after a pass of so many sequences and tokens, for layers of transformers' own that repeated
            calls do not fill as a pass would; None if there are none.
    """

    def __init__(
        self,
        make: Callable[[], Cache],
        calls: list[tuple[LayerCall, ...]],
        fill: Callable[[int, int], Cache] | None = None,
    ) -> None:
        self._make, self._calls, self._fill = make, calls, fill
        self._known: dict[tuple[int, int], Held] = {}

    def bytes(self, batch: int, tokens: int) -> Held:
        """Bytes after a prompt of ``tokens`` tokens of each of ``batch`` sequences, read in one forward pass."""
        size = batch, tokens
        if size not in self._known:
            self._known[size] = self._find(batch, tokens)
        return self._known[size]

    def _find(self, batch: int, tokens: int) -> Held:
        total, alike = Held(0, 0), dict[Any, Held]()
        filled = None if self._fill is None else self._fill(batch, tokens).layers
        for index, (layer, calls) in enumerate(zip(self._make().layers, self._calls, strict=True)):
            if filled is not None and not isinstance(layer, KVCacheLayer):
                total += _held_by(filled[index])
                continue
            kind = type(layer), getattr(layer, "sliding_window", None), repr(calls)
            if kind not in alike:
                for call in calls:
                    call.repeat(layer, batch, _as_many_held(layer, calls, tokens))
                alike[kind] = _held_by(layer)
            total += alike[kind]
        return total


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
    return Held(total, total - sum(parts[name] for name in _NOT_READ))
