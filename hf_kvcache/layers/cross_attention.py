"""A cache layer of states that do not come from the text, such as those of an image in Mllama."""

from __future__ import annotations

from typing import Any

import torch

from hf_kvcache.integration.padding import Padding
from hf_kvcache.layers.base import KVCacheLayer


def cross_attention_layers(config: Any) -> frozenset[int]:
    """The numbers of the decoder layers that attend to states of another input than the text."""
    return frozenset(getattr(config, "cross_attention_layers", None) or ())


class CrossAttentionLayer(KVCacheLayer):
    """The cache of one cross-attention layer.

    It holds the states of an image, not tokens of the text. So attention to them is not causal, none of them is
    padding, and none is evicted. The model reads the states from the layer at every step, and they are decompressed for
    it.
    """

    def has_history(self) -> bool:
        self._latest()
        return False  # new_tokens() returns all states

    def new_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        new, _ = self._latest()
        if new.position == 0:
            return super().new_tokens()
        return self.decompressed("keys"), self.decompressed("values")

    def held_states(self, side: str) -> torch.Tensor | None:
        return None if self.storage is None else self.decompressed(side)

    def note_padding(self, new: Any, attention_mask: torch.Tensor | None) -> Padding | None:
        return None
