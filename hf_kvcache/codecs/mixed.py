"""Mixed precision: one codec for each layer of a model."""

from __future__ import annotations

from collections.abc import Mapping

from hf_kvcache.codecs.base import Codec


class MixedCodec(Codec):
    """A codec for each layer. It has no sides of its own: who stores pages asks :meth:`of_layer` first.

    Args:
        layers: the codecs by the index of the layer in the cache.
    """

    name = "mixed"

    def __init__(self, layers: Mapping[int, Codec]) -> None:
        super().__init__()
        self.layers = dict(layers)

    def __repr__(self) -> str:
        return f"mixed({', '.join(f'{index}: {codec!r}' for index, codec in self.layers.items())})"

    def of_layer(self, index: int) -> Codec:
        return self.layers[index]

    def all(self) -> list[Codec]:
        return list(dict.fromkeys(self.layers.values()))
