"""Sinks that move along with the window behind them (StreamingLLM's positions inside the cache, arXiv:2309.17453).

Distances within the window are the same whether positions are original or counted inside the cache; only the sinks
come nearer. So it is enough to rotate the keys of the sinks, each time from where they stood at first.
"""

from __future__ import annotations

import numpy as np
import torch

from hf_kvcache.integration.rope import LayerRope
from hf_kvcache.storage import PagedStorage


class MovingSinks:
    """The keys of a layer's sinks as they were before any of them was moved.

    Attributes:
        keys: ``[B, Hkv, sinks, D]``, at their original positions; None before any was moved.
        moved: bool ``[B]``, the sequences whose sinks were moved; the keys of the others are not remembered yet.
    """

    def __init__(self, batch: int) -> None:
        self.keys: torch.Tensor | None = None
        self.moved = np.zeros(batch, bool)

    def move(self, storage: PagedStorage, rope: LayerRope, rows: np.ndarray, dropped: np.ndarray) -> None:
        """Rotate the sinks of ``rows`` forward by the number of tokens that were dropped behind them.

        Args:
            storage: the layer's tokens.
            rope: its rotary embedding.
            rows: the sequences.
            dropped: int64 ``[len(rows)]``, tokens dropped so far.
        """
        # Nothing is dropped before all sinks are there.
        rows, dropped = rows[dropped > 0], dropped[dropped > 0]
        if len(rows) == 0:
            return
        sinks = storage.sink_length
        keys = self._remembered(storage, rows)
        index, by = (torch.from_numpy(x).to(storage.device) for x in (rows, dropped))
        at = torch.from_numpy(storage.dense.positions[rows, :sinks]).to(storage.device)[:, None]
        moved = rope.rotate(rope.unrotate(keys[index].float(), at), at + by[:, None, None])
        storage.dense.keys[index, :, :sinks] = moved.to(storage.dtype)

    def select(self, rows: np.ndarray) -> MovingSinks:
        """A copy with the sequences ``rows`` only, which may repeat."""
        other = MovingSinks(len(rows))
        other.moved = self.moved[rows]
        other.keys = None if self.keys is None else self.keys[torch.from_numpy(rows).to(self.keys.device)]
        return other

    def state(self) -> dict[str, torch.Tensor]:
        """The keys and ``moved`` as tensors by name; empty before any was moved."""
        if self.keys is None:
            return {}
        return {"keys": self.keys, "moved": torch.from_numpy(self.moved)}

    def restore(self, state: dict[str, torch.Tensor], device: torch.device) -> None:
        """Take over what :meth:`state` returned."""
        if state:
            self.keys, self.moved = state["keys"].to(device), state["moved"].numpy().copy()

    def _remembered(self, storage: PagedStorage, rows: np.ndarray) -> torch.Tensor:
        """The original keys; those of ``rows`` are taken from the storage if they were not moved before."""
        new = rows[~self.moved[rows]]
        keys, index = storage.dense.keys[:, :, : storage.sink_length], torch.from_numpy(new).to(storage.device)
        known = torch.zeros_like(keys) if self.keys is None else self.keys
        self.keys = known.index_copy(0, index, keys[index])
        self.moved[new] = True
        return self.keys
