"""A cache layer of a model whose indexer chooses which blocks of keys and values are attended to (MiniMax-M3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.indexer_keys import IndexerKeys
from hf_kvcache.layers.saved_state import Device


class IndexedLayer(KVCacheLayer):
    """A layer of keys and values that also holds the keys of an indexer.

    The indexer reads all of its keys at every step, so they stay dense. What it chooses comes to attention as a mask.
    """

    optional_tensors = ("indexer",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.indexer = IndexerKeys()

    def update_index(self, idx_k: torch.Tensor) -> torch.Tensor:
        """Add the new keys of the indexer ``[B, 1, T, d]``; returns all of its keys, ``[B, 1, tokens, d]``.

        Raises:
            ValueError: if batch, width or dtype differ from those of the keys held.
        """
        return self.indexer.append(idx_k.squeeze(1)).unsqueeze(1)

    @property
    def complete_length(self) -> int:
        return min(super().complete_length, self.indexer.length)  # the model gives the keys of the indexer later

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.indexer.drop_last(-tokens_to_remove)

    def take_back(self, length: int) -> None:
        super().take_back(length)
        self.indexer.drop_last(max(self.indexer.length - length, 0))

    def select_rows(self, rows: np.ndarray) -> None:
        super().select_rows(rows)
        self.indexer.select(rows)

    def reset(self) -> None:
        super().reset()
        self.indexer = IndexerKeys()

    def _copy(self) -> Any:
        other = super()._copy()
        other.indexer = self.indexer.fork()
        return other

    def own_tensors(self) -> list[torch.Tensor]:
        return [*super().own_tensors(), *self.indexer.tensors()]

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        state, keys = super().stored_tensors(), self.indexer.keys()
        return state if keys is None else state | {"indexer": keys.clone()}

    def restore(
        self, tensors: dict[str, torch.Tensor], progress: dict[str, int], device: Device = None, owned: bool = False
    ) -> None:
        super().restore({name: x for name, x in tensors.items() if name != "indexer"}, progress, device, owned)
        if "indexer" in tensors:
            self.indexer.append(tensors["indexer"].to(self.device))
