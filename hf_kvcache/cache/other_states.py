"""Calls of the model to transformers' own layers: convolutions and recurrences of hybrid models."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from hf_kvcache.integration.compiling import outside_graphs


class OtherStates(Cache):
    """A transformers cache that records when the model comes to a layer of transformers' own.

    The methods do what they do in any cache, and call :meth:`enter_other_layer` before.
    """

    def enter_other_layer(self, layer_idx: int) -> None:
        """Record that a forward pass comes to a layer of transformers' own.

        Raises:
            RuntimeError: if the pass before it ended in the middle.
        """
        raise NotImplementedError

    @outside_graphs
    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Add new states to a convolution layer of transformers' own; returns the states that it now holds."""
        self.enter_other_layer(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    @outside_graphs
    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """The states of a convolution layer of transformers' own. The model may write into them."""
        self.enter_other_layer(layer_idx)
        return super().get_conv_state(layer_idx, *args, **kwargs)

    @outside_graphs
    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """The state of a recurrent layer of transformers' own. The model may write into it."""
        self.enter_other_layer(layer_idx)
        return super().get_recurrent_state(layer_idx, *args, **kwargs)

    @outside_graphs
    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Replace the state of a recurrent layer of transformers' own; returns the state that it now holds."""
        self.enter_other_layer(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    @outside_graphs
    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        """Whether a layer of transformers' own has a state.

        Args:
            layer_idx: the layer; a model layer passes its own number. None stands for the last such layer.
            *args: passed on to transformers.
            **kwargs: passed on to transformers.
        """
        found = super().has_previous_state(layer_idx, *args, **kwargs)
        if found and layer_idx is not None:
            self.enter_other_layer(layer_idx)
        return found
