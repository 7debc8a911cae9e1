"""Where a forward pass is, and whether the latest one came to its end: layers hold different tokens if it did not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from hf_kvcache.cache.model_config import borrowing_layers, places_in_pass
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.cross_attention import cross_attention_layers


class ForwardPass:
    """The order in which a forward pass touches the layers of a cache, and how far it has come.

    Args:
        config: of the model.
        layers: of the cache.

    Attributes:
        places: when a pass comes to each layer.
        cross: layers that only a pass with an image touches.
        aside: layers to which not every pass adds tokens.
        final: the place where a pass ends.
        reached: the place to which the latest pass has come.
    """

    def __init__(self, config: PreTrainedConfig, layers: Sequence[Any]) -> None:
        self.places = places_in_pass(config, len(layers))
        self.cross = cross_attention_layers(config)
        self.aside = self.cross | borrowing_layers(config)
        own = [layer.index for layer in layers if isinstance(layer, KVCacheLayer)]
        self.final = max(self.places[index] for index in own if index not in self.aside)
        self.reached = self.final

    @property
    def ended(self) -> bool:
        """Whether the pass has touched its last layer."""
        return self.reached == self.final

    def end(self) -> None:
        """Take note that all layers hold the same tokens."""
        self.reached = self.final

    def goes_back(self, index: int) -> bool:
        """Whether a pass that has not ended comes to a layer of transformers' own that lies behind it."""
        return not self.ended and self.places[index] < self.reached

    def note_other(self, index: int) -> None:
        """Take note that the pass has come to a layer that is transformers' own."""
        self.reached = self.places[index]
        self.final = max(self.final, self.reached)

    def has_come_to(self, index: int) -> bool:
        """Whether the pass has touched a layer."""
        return self.places[index] <= self.reached

    def passed(self, layers: Sequence[Any]) -> list[KVCacheLayer]:
        """The layers of this package that every pass adds tokens to."""
        return [layer for layer in layers if isinstance(layer, KVCacheLayer) and layer.index not in self.aside]

    def complete_length(self, layers: Sequence[Any]) -> int:
        """Tokens that every layer has seen."""
        return min(layer.complete_length for layer in self.passed(layers))

    def take_back(self, layers: Sequence[Any]) -> bool:
        """Return to what was held before a pass that ended in the middle.

        Returns:
            Whether something was held; if not, nothing was changed, and the cache is to be reset.

        Raises:
            RuntimeError: if a layer cannot go back; nothing was changed then.
        """
        length, added = self.complete_length(layers), {}
        for index, layer in enumerate(layers):
            if index in self.cross:
                continue
            if isinstance(layer, KVCacheLayer):
                layer.check_whole()
                if length:
                    layer.check_take_back(length)
            elif length and hasattr(layer, "conv_states") and self.has_come_to(index):
                raise RuntimeError(
                    f"crop(): a forward pass ended in the middle, and the states of layer {index} "
                    f"({type(layer).__name__}) cannot be taken back; call reset()"
                )
            elif isinstance(layer, CacheLayerMixin):
                added[index] = layer.get_seq_length() - length
        if not length:
            return False
        for index, layer in enumerate(layers):
            if isinstance(layer, KVCacheLayer) and index not in self.cross:
                layer.take_back(length)
        for index, tokens in added.items():
            layers[index].crop(-tokens)
        self.end()
        return True

    def copy(self) -> ForwardPass:
        """A pass of a fork, as far as this one."""
        other = object.__new__(ForwardPass)
        other.__dict__.update(self.__dict__)
        return other
