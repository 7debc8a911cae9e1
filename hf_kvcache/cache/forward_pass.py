"""How far a forward pass has come. If a pass ended in the middle, the layers of a cache hold different tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from hf_kvcache.cache.model_config import borrowing_layers, places_in_pass
from hf_kvcache.layers.cross_attention import cross_attention_layers
from hf_kvcache.layers.own import OwnLayer


class ForwardPass:
    """The order in which a forward pass updates the layers of a cache, and how far the latest pass has come.

    Args:
        config: the config of the model.
        layers: the layers of the cache.

    Attributes:
        places: for each layer, its place in the order of a pass.
        cross: numbers of the cross-attention layers, which only a pass with an image updates.
        not_in_every_pass: numbers of the layers that some passes do not update.
        final: the place of the last layer of a pass.
        reached: the place of the layer that the latest pass updated last.
    """

    def __init__(self, config: PreTrainedConfig, layers: Sequence[Any]) -> None:
        self.places = places_in_pass(config, len(layers))
        self.cross = cross_attention_layers(config)
        self.not_in_every_pass = self.cross | borrowing_layers(config)
        own = [layer.index for layer in layers if isinstance(layer, OwnLayer)]
        self.final = max(self.places[index] for index in own if index not in self.not_in_every_pass)
        self.reached = self.final

    @property
    def ended(self) -> bool:
        """Whether the latest pass has updated its last layer."""
        return self.reached == self.final

    def end(self) -> None:
        """Record that the pass is complete: all layers hold the same tokens."""
        self.reached = self.final

    def goes_back(self, index: int) -> bool:
        """Whether a layer lies before the one that an unfinished pass has reached, so that a new pass has begun."""
        return not self.ended and self.places[index] < self.reached

    def enter_other_layer(self, index: int) -> None:
        """Record that the pass has come to a layer of transformers' own."""
        self.reached = self.places[index]
        self.final = max(self.final, self.reached)

    def has_reached(self, index: int) -> bool:
        """Whether the latest pass has come to a layer."""
        return self.places[index] <= self.reached

    def in_every_pass(self, layers: Sequence[Any]) -> list[OwnLayer]:
        """The layers of this package to which every pass adds tokens."""
        return [layer for layer in layers if isinstance(layer, OwnLayer) and layer.index not in self.not_in_every_pass]

    def complete_length(self, layers: Sequence[Any]) -> int:
        """Number of tokens that every layer has seen."""
        return min(layer.complete_length for layer in self.in_every_pass(layers))

    def take_back(self, layers: Sequence[Any]) -> bool:
        """Return to the tokens of the last complete pass.

        Args:
            layers: the layers of the cache.

        Returns:
            False if there was no complete pass. Then nothing is changed, and the caller must reset the cache.

        Raises:
            RuntimeError: if a layer cannot return to these tokens. Then nothing is changed.
        """
        length, added = self.complete_length(layers), {}
        for index, layer in enumerate(layers):
            if index in self.cross:
                continue
            if isinstance(layer, OwnLayer):
                layer.check_whole()
                if length:
                    layer.check_take_back(length)
            elif length and hasattr(layer, "conv_states") and self.has_reached(index):
                raise RuntimeError(
                    f"crop(): a forward pass ended in the middle, and the states of layer {index} "
                    f"({type(layer).__name__}) cannot return to those before the pass; call reset()"
                )
            elif isinstance(layer, CacheLayerMixin):
                added[index] = layer.get_seq_length() - length
        if not length:
            return False
        for index, layer in enumerate(layers):
            if isinstance(layer, OwnLayer) and index not in self.cross:
                layer.take_back(length)
        for index, tokens in added.items():
            layers[index].crop(-tokens)
        self.end()
        return True

    def copy(self) -> ForwardPass:
        """A copy for a fork of the cache."""
        other = object.__new__(ForwardPass)
        other.__dict__.update(self.__dict__)
        return other
