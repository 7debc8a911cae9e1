"""The positions of padding in a batch. Padding tokens are counted as seen, but nothing is stored of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hf_kvcache.kernels.device_table import to_device


class PaddingPlaces:
    """The positions of padding of each sequence. Instances never change, so that the layers of a model can share them.

    Args:
        rows: int64 ``[n]``, the sequence of each place.
        positions: int64 ``[n]``, the position of each place among the tokens seen.
    """

    def __init__(self, rows: np.ndarray, positions: np.ndarray) -> None:
        self.rows, self.positions = rows, positions
        self._next: tuple[np.ndarray, int, PaddingPlaces] | None = None
        self._selected: tuple[np.ndarray, PaddingPlaces] | None = None
        self._there: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return padding_places, (self.rows, self.positions)  # without padding there is only one object, NO_PADDING

    def on_device(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and positions as tensors on ``device``. They are sent there once."""
        if device not in self._there:
            with torch.inference_mode(False):
                rows, positions = (to_device(x, device) for x in (self.rows, self.positions))
            self._there[device] = rows, positions
        return self._there[device]

    def extend(self, position: int, valid: np.ndarray | None) -> PaddingPlaces:
        """The places after more tokens, from ``position`` on, which are padding where ``valid [B, T]`` is False."""
        if valid is None:
            return self
        known = self._next
        if known is None or known[0] is not valid or known[1] != position:
            # Layers with the same mask ask for the same places. They get one object, which is compared with a mask
            # once.
            rows, columns = np.nonzero(~valid)
            both = np.concatenate([self.rows, rows]), np.concatenate([self.positions, position + columns])
            known = self._next = valid, position, padding_places(*both)
        return known[2]

    def before(self, length: int) -> PaddingPlaces:
        """The places among the first ``length`` tokens."""
        keep = self.positions < length
        return self if keep.all() else padding_places(self.rows[keep], self.positions[keep])

    def select(self, rows: np.ndarray) -> PaddingPlaces:
        """The places of the sequences ``rows``, which are numbered anew in this order."""
        if self is NO_PADDING:
            return self
        known = self._selected
        if known is None or not np.array_equal(known[0], rows):
            # As in `extend`. Beams of one prompt have the same padding, and exchanging them gives this object itself.
            known = self._selected = rows.copy(), self._select(rows)
        return known[1]

    def _select(self, rows: np.ndarray) -> PaddingPlaces:
        where = [np.flatnonzero(self.rows == row) for row in rows]
        new = np.repeat(np.arange(len(rows)), [len(at) for at in where])
        positions = self.positions[np.concatenate(where)] if where else np.zeros(0, np.int64)
        same = np.array_equal(new, self.rows) and np.array_equal(positions, self.positions)
        return self if same else padding_places(new, positions)

    def counts(self, batch: int) -> np.ndarray:
        """The number of places of each of ``batch`` sequences, int64 ``[B]``."""
        return np.bincount(self.rows, minlength=batch)

    def numbers(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """``positions [b, ...]`` of the sequences ``rows`` as they would be without padding."""
        if self is NO_PADDING:
            return positions
        # The places of a sequence ascend: each update adds later ones.
        before = [
            np.searchsorted(self.positions[self.rows == row], at) for row, at in zip(rows, positions, strict=True)
        ]
        return positions - np.stack(before)

    def by_sequence(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """The positions, sequence after sequence, and how many of them each of ``batch`` sequences has, ``[B]``."""
        return self.positions[np.argsort(self.rows, kind="stable")], self.counts(batch)


def padding_places(rows: np.ndarray, positions: np.ndarray) -> PaddingPlaces:
    """The places as an object; :data:`NO_PADDING` itself if there are none."""
    return PaddingPlaces(rows, positions) if len(rows) else NO_PADDING


def padding_by_sequence(positions: np.ndarray, counts: np.ndarray) -> PaddingPlaces:
    """The places that :meth:`PaddingPlaces.by_sequence` returned; raises ValueError if the two do not go together."""
    if counts.sum() != len(positions):
        raise ValueError(f"'padding' has {len(positions)} positions, 'padding_lengths' {counts.sum()} in all")
    return padding_places(np.repeat(np.arange(len(counts)), counts), positions.copy())


#: The places of a batch without padding.
NO_PADDING = PaddingPlaces(np.zeros(0, np.int64), np.zeros(0, np.int64))
