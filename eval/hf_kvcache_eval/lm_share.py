"""How much of what a task prefilled was compressed when it was read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_kvcache import KVCache
from hf_kvcache.layers.evicting import EvictingLayer


@dataclass
class Prefilled:
    """Tokens that were held when the first scored token was predicted, over all sequences.

    Where nothing was prefilled (a text that is scored from its first token), those held at its end.

    Attributes:
        tokens: all of them.
        compressed: those that were packed or evicted, averaged over layers.
        empty: sequences of which nothing was compressed, since they begin with one token and it is not prefilled.
    """

    tokens: int = 0
    compressed: float = 0.0
    empty: int = 0

    def note(self, cache: Any, lengths: list[int], width: int) -> None:
        """Count a cache that holds sequences of ``lengths`` tokens, padded to ``width``."""
        self.tokens += sum(lengths)
        self.compressed += _compressed_positions(cache, len(lengths) * width) + _evicted(cache, sum(lengths))

    @property
    def share(self) -> float:
        """Compressed tokens over all."""
        return self.compressed / self.tokens if self.tokens else 0.0


def _compressed_positions(cache: Any, positions: int) -> float:
    shares = _packed(cache) if isinstance(cache, KVCache) else [_left(layer) for layer in cache.layers]
    return positions * sum(shares) / len(shares) if shares else 0.0


def _evicted(cache: Any, tokens: int) -> float:
    """Of ``tokens``, those that are gone, averaged over heads and over the layers that evict."""
    held = [layer.kept_positions() >= 0 for layer in cache.layers if isinstance(layer, EvictingLayer)]
    return tokens - sum(float(layer.sum()) / layer.shape[1] for layer in held) / len(held) if held else 0.0


def _packed(cache: KVCache) -> list[float]:
    """Per layer, packed elements over those of all positions, padding included."""
    reports = zip(cache.layers, cache.memory().layers, strict=True)
    # A sliding layer forgets tokens with any cache: that is the model's doing.
    return [
        report.packed_elements / (report.full_bf16 / 2)
        for layer, report in reports
        if layer in cache.own_layers and layer.sliding_window is None and report.full_bf16
    ]


def _left(layer: Any) -> float:
    """The share of the tokens seen that transformers' layer does not hold as they came."""
    seen = layer.get_seq_length()
    if not seen or getattr(layer, "is_sliding", False) or not hasattr(layer, "keys"):
        return 0.0
    held = layer.keys.shape[-2] if layer.keys is not None and layer.keys.dim() == 4 else 0
    return 1 - held / seen
