"""The keys of a sparse-attention indexer. The indexer reads all of them at every step, so they stay dense."""

from __future__ import annotations

import numpy as np
import torch

#: Number of tokens for which the buffer has room at first.
_ROOM = 256


class IndexerKeys:
    """Keys ``[B, T, d]`` of an indexer, in a buffer with spare room.

    A full buffer grows by half of its size, so most steps append a token without copying the earlier ones.
    """

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        #: Number of tokens held.
        self.length = 0

    @property
    def batch(self) -> int:
        """Number of sequences; 0 before the first keys."""
        return 0 if self._buffer is None else self._buffer.shape[0]

    def append(self, keys: torch.Tensor) -> torch.Tensor:
        """Add new keys ``[B, T, d]``.

        Returns:
            A view of all keys, ``[B, tokens, d]``, valid until the next change.

        Raises:
            ValueError: if batch, width or dtype differ from those of the keys held.
        """
        held, length = self._buffer, self.length + keys.shape[1]
        if held is not None and (keys.shape[0], keys.shape[2:], keys.dtype) != (
            held.shape[0],
            held.shape[2:],
            held.dtype,
        ):
            raise ValueError(
                f"indexer_key_states {list(keys.shape)} {keys.dtype} do not go with those held; accepted: batch "
                f"{held.shape[0]}, dim {held.shape[2]}, {held.dtype}. Call reset() before another batch."
            )
        if held is None or held.shape[1] < length:
            room = max(length, held.shape[1] * 3 // 2 if held is not None else _ROOM)
            with torch.inference_mode(False):  # an inference tensor could not be written outside of that mode
                grown = torch.zeros(keys.shape[0], room, keys.shape[2], dtype=keys.dtype, device=keys.device)
            if held is not None:
                grown[:, : self.length] = held[:, : self.length]
            self._buffer = held = grown
        held[:, self.length : length] = keys.detach()
        self.length = length
        return held[:, :length]

    def keys(self) -> torch.Tensor | None:
        """A view of all keys, ``[B, T, d]``; None before the first."""
        return None if self._buffer is None else self._buffer[:, : self.length]

    def drop_last(self, count: int) -> None:
        """Drop the newest ``count`` keys of each sequence."""
        self.length = max(0, self.length - count)

    def select(self, rows: np.ndarray) -> None:
        """Replace sequence ``i`` by sequence ``rows[i]``, for every ``i``."""
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
        """The allocated tensors, spare room included, for the memory report."""
        return [] if self._buffer is None else [self._buffer]
