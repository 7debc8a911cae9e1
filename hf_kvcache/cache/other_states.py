"""States of layers that are transformers' own: convolutions and recurrences of hybrid models."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from hf_kvcache.integration.compiling import outside_graphs


class OtherStates(Cache):
    """A cache that is told whenever the model comes to a layer of transformers' own."""

    def reach(self, layer_idx: int) -> None:
        """Take note that a forward pass comes to a layer that is transformers' own."""
        raise NotImplementedError

    @outside_graphs
    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Take in the states of a convolution of a layer that is transformers' own."""
        self.reach(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    @outside_graphs
    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """The states of a convolution of a layer that is transformers' own; whoever asks writes into them."""
        self.reach(layer_idx)
        return super().get_conv_state(layer_idx, *args, **kwargs)

    @outside_graphs
    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """The state of a recurrence of a layer that is transformers' own; whoever asks writes into it."""
        self.reach(layer_idx)
        return super().get_recurrent_state(layer_idx, *args, **kwargs)

    @outside_graphs
    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Take in the state of a recurrence of a layer that is transformers' own."""
        self.reach(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    @outside_graphs
    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        """Whether a layer that is transformers' own has a state; with a number it is the layer itself that asks."""
        found = super().has_previous_state(layer_idx, *args, **kwargs)
        if found and layer_idx is not None:
            self.reach(layer_idx)
        return found
