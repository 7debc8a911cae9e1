"""A cache layer of states that come from elsewhere than the text: an image's, in Mllama."""

from __future__ import annotations

from typing import Any

import torch

from hf_kvcache.integration.padding import Padding
from hf_kvcache.layers.base import KVCacheLayer


def cross_attention_layers(config: Any) -> frozenset[int]:
    """The layers of a decoder that attend to other states than those of its own tokens."""
    return frozenset(getattr(config, "cross_attention_layers", None) or ())


class CrossAttentionLayer(KVCacheLayer):
    """One cross-attention layer's cache.

    Its states are as many as the image needs and no tokens of the text: nothing is causal, padding or ever evicted. The
    model reads them from the layer itself at every step, so that they are decompressed and attended to as they are.
    """

    def has_history(self) -> bool:
        self._latest()
        return False  # all that is held is shown at once

    def new_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        new, _ = self._latest()
        if new.position == 0:
            return super().new_tokens()
        return self.decompressed("keys"), self.decompressed("values")

    def held_states(self, side: str) -> torch.Tensor | None:
        return None if self.storage is None else self.decompressed(side)

    def note_padding(self, new: Any, attention_mask: torch.Tensor | None) -> Padding | None:
        return None
