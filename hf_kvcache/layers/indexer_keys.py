"""The keys of a sparse-attention indexer: read whole at every step, so they stay dense."""

from __future__ import annotations

import numpy as np
import torch

#: Tokens that there is room for at first.
_ROOM = 256


class IndexerKeys:
    """Keys ``[B, T, d]`` in a buffer that grows by half, so that a step appends without copying what is held."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        #: Tokens held.
        self.length = 0

    @property
    def batch(self) -> int:
        """Sequences held."""
        return 0 if self._buffer is None else self._buffer.shape[0]

    def append(self, keys: torch.Tensor) -> torch.Tensor:
        """Take in new keys ``[B, T, d]``; returns a view of all, valid until the next change.

        Raises:
            ValueError: if they do not go with those held.
        """
        held, length = self._buffer, self.length + keys.shape[1]
        if held is not None and (keys.shape[0], keys.shape[2:], keys.dtype) != (
            held.shape[0],
            held.shape[2:],
            held.dtype,
        ):
            raise ValueError(
                f"indexer_key_states {list(keys.shape)} {keys.dtype} do not go with those held: batch {held.shape[0]}, "
                f"dim {held.shape[2]}, {held.dtype}"
            )
        if held is None or held.shape[1] < length:
            room = max(length, held.shape[1] * 3 // 2 if held is not None else _ROOM)
            with torch.inference_mode(False):  # else it could not be written outside of that mode
                grown = torch.zeros(keys.shape[0], room, keys.shape[2], dtype=keys.dtype, device=keys.device)
            if held is not None:
                grown[:, : self.length] = held[:, : self.length]
            self._buffer = held = grown
        held[:, self.length : length] = keys.detach()
        self.length = length
        return held[:, :length]

    def keys(self) -> torch.Tensor | None:
        """All keys, a view; None before the first."""
        return None if self._buffer is None else self._buffer[:, : self.length]

    def drop_last(self, count: int) -> None:
        """Forget the newest ``count``."""
        self.length = max(0, self.length - count)

    def select(self, rows: np.ndarray) -> None:
        """Replace the sequences by ``rows`` of them."""
        if self._buffer is not None:
            index = torch.from_numpy(rows).to(self._buffer.device)
            with torch.inference_mode(False):
                self._buffer = self._buffer[index]

    def fork(self) -> IndexerKeys:
        """An independent copy."""
        other = IndexerKeys()
        held = self.keys()
        if held is not None:
            other.append(held)
        return other

    def tensors(self) -> list[torch.Tensor]:
        """What is allocated."""
        return [] if self._buffer is None else [self._buffer]
