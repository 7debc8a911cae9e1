"""How many tokens stay, and which of them whatever their score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

Pin = tuple[int, int] | range | torch.Tensor | None


@dataclass(frozen=True)
class Budget:
    """Tokens that a head keeps, on average over heads and layers.

    Attributes:
        amount: a whole number of tokens, or a share below 1 of the real tokens seen.
        least: tokens that are never evicted (sinks and tail), the least that a budget can be.

    Raises:
        ValueError: if ``amount`` is neither, or below ``least``.
    """

    amount: int | float
    least: int

    def __post_init__(self) -> None:
        amount = self.amount
        whole = isinstance(amount, int) and not isinstance(amount, bool)
        if not whole and not (isinstance(amount, float) and 0 < amount < 1):
            raise ValueError(f"budget={amount!r}; accepted: a whole number of tokens, or a share above 0 and below 1")
        if whole and amount < self.least:
            raise ValueError(
                f"budget={amount!r}; accepted: from {self.least} tokens, which is what sink_length + tail_length keep"
            )

    def tokens(self, seen: int) -> int:
        """Tokens that a head of a sequence keeps after ``seen`` real tokens; of a share at least ``least``."""
        if isinstance(self.amount, int):
            return self.amount
        return max(self.least, round(self.amount * seen))


class Pins:
    """Tokens that stay because the user says so, by position.

    Args:
        pin: ``(start, stop)`` or a range over the real tokens of each sequence, counted from 0; or a bool mask
            ``[B, n]`` over the first ``n`` tokens seen, padding included; or None.

    Raises:
        ValueError: if it is none of these.
    """

    def __init__(self, pin: Pin) -> None:
        self.span: tuple[int, int] | None = None
        self.mask: np.ndarray | None = None  # bool [B, n]
        if pin is None:
            return
        if isinstance(pin, torch.Tensor):
            if pin.dtype != torch.bool or pin.dim() != 2:
                raise ValueError(f"pin of shape {tuple(pin.shape)} and {pin.dtype}; accepted: a bool mask [B, tokens]")
            self.mask = pin.cpu().numpy()
            return
        if isinstance(pin, range) and pin.step == 1:
            pin = (pin.start, pin.stop)
        if not (isinstance(pin, tuple) and len(pin) == 2 and all(type(end) is int for end in pin)):
            raise ValueError(
                f"pin={pin!r}; accepted: (start, stop), a range of step 1, a bool mask [B, tokens], or None"
            )
        if not 0 <= pin[0] < pin[1]:
            raise ValueError(f"pin={pin!r}; accepted: (start, stop) with 0 <= start < stop")
        self.span = pin

    @property
    def count(self) -> int:
        """The most tokens of a sequence that are pinned."""
        if self.span is not None:
            return self.span[1] - self.span[0]
        return 0 if self.mask is None else int(self.mask.sum(1).max(initial=0))

    def by_row(self, batch: int) -> PinnedPositions:
        """The pinned positions of ``batch`` sequences that have seen nothing yet.

        Raises:
            ValueError: if the mask is of another number of sequences.
        """
        if self.mask is not None and len(self.mask) != batch:
            raise ValueError(
                f"pin is a mask of {len(self.mask)} sequences; accepted: {batch}, as many as are generated"
            )
        mask = np.zeros((batch, 0), bool) if self.mask is None else self.mask.copy()
        return PinnedPositions(self.span, mask, np.zeros(batch, np.int64), [np.zeros(0, np.int64)] * batch)


@dataclass
class PinnedPositions:
    """Which positions of each sequence are pinned, and which are of real tokens, as far as they have been seen.

    Attributes:
        span: the real tokens that are pinned, if they are given so.
        mask: bool ``[B, n]``, by position.
        real: int64 ``[B]``, real tokens that each sequence has seen.
        padding: int64, by sequence, the positions of padding that it has seen, ascending.
    """

    span: tuple[int, int] | None
    mask: np.ndarray
    real: np.ndarray
    padding: list[np.ndarray]

    def see(self, position: int, length: int, valid: np.ndarray | None) -> None:
        """Take note of ``length`` tokens from ``position`` on, of which ``valid [B, length]`` are real."""
        if valid is not None:
            new_padding = [position + np.flatnonzero(~row) for row in valid]
            self.padding = [np.concatenate(both) for both in zip(self.padding, new_padding, strict=True)]
        if self.span is None or int(self.real.min(initial=0)) >= self.span[1]:
            self.real = self.real + (length if valid is None else valid.sum(1))
            return
        real = np.ones((len(self.real), length), bool) if valid is None else valid
        number = self.real[:, None] + real.cumsum(1) - 1
        new = real & (number >= self.span[0]) & (number < self.span[1])
        padding = max(0, position - self.mask.shape[1])
        self.mask = np.concatenate([np.pad(self.mask[:, :position], ((0, 0), (0, padding))), new], 1)
        self.real = self.real + real.sum(1)

    def forget(self, removed: np.ndarray, seen: int) -> None:
        """Take note that of ``seen`` tokens on, ``removed [B]`` real ones, nothing is left."""
        self.real = self.real - removed
        self.padding = [row[row < seen] for row in self.padding]
        if self.span is not None:
            self.mask = self.mask[:, :seen]

    def at(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Which of ``positions [b, Hkv, T]`` of the sequences ``rows`` are pinned."""
        length = self.mask.shape[1]
        if length == 0:
            return np.zeros(positions.shape, bool)
        inside = positions < length
        return self.mask[rows[:, None, None], np.where(inside, positions, 0)] & inside

    def numbers(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Which of the real tokens of its sequence, from 0, stands at each of ``positions [b, ...]``."""
        before = [np.searchsorted(self.padding[row], at) for row, at in zip(rows, positions, strict=True)]
        return positions - np.stack(before)

    def select(self, rows: np.ndarray) -> PinnedPositions:
        """The same for the sequences ``rows`` of these."""
        return PinnedPositions(self.span, self.mask[rows], self.real[rows], [self.padding[row] for row in rows])
