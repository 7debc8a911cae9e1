"""How many tokens stay, and which tokens stay whatever their scores."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from hf_kvcache.kernels.padding import NO_PADDING, PaddingPlaces, padding_by_sequence
from hf_kvcache.storage.transfers import to_device

Pin = tuple[int, int] | range | torch.Tensor | None


@dataclass(frozen=True)
class Budget:
    """Tokens that a head keeps, on average over heads and layers.

    Attributes:
        amount: a whole number of tokens, or a share below 1 of the non-padding tokens seen.
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
        """Tokens that a head of a sequence keeps after ``seen`` non-padding tokens; of a share at least ``least``."""
        if isinstance(self.amount, int):
            return self.amount
        return max(self.least, round(self.amount * seen))


class Pins:
    """Tokens that stay because the user says so, by position.

    Args:
        pin: ``(start, stop)`` or a range over the non-padding tokens of each sequence, counted from 0; or a bool mask
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
        return PinnedPositions(self.span, mask, np.zeros(batch, np.int64))


@dataclass
class PinnedPositions:
    """Which positions of each sequence are pinned, and which of them padding takes up, as far as they were seen.

    Attributes:
        span: the non-padding tokens that are pinned, if they are given so.
        mask: bool ``[B, n]``, by position.
        counts: int64 ``[B]``, non-padding tokens that each sequence has seen.
        padding: where padding stood.
        padded: whether an update said which of its tokens are padding; sequences are then looked at one by one.
    """

    span: tuple[int, int] | None
    mask: np.ndarray
    counts: np.ndarray
    padding: PaddingPlaces = NO_PADDING
    padded: bool = False

    def see(self, position: int, length: int, valid: np.ndarray | None) -> None:
        """Take note of ``length`` tokens from ``position`` on; ``valid [B, length]`` is False for padding."""
        self.padding = self.padding.extend(position, valid)
        self.padded |= valid is not None
        if self.span is None or int(self.counts.min(initial=0)) >= self.span[1]:
            self.counts = self.counts + (length if valid is None else valid.sum(1))
            return
        counted = np.ones((len(self.counts), length), bool) if valid is None else valid
        number = self.counts[:, None] + counted.cumsum(1) - 1
        new = counted & (number >= self.span[0]) & (number < self.span[1])
        missing = max(0, position - self.mask.shape[1])
        self.mask = np.concatenate([np.pad(self.mask[:, :position], ((0, 0), (0, missing))), new], 1)
        self.counts = self.counts + counted.sum(1)

    def forget(self, removed: np.ndarray, seen: int) -> None:
        """Take note that the tokens behind the first ``seen`` are gone, ``removed [B]`` of them not padding."""
        self.counts = self.counts - removed
        self.padding = self.padding.before(seen)
        if self.span is not None:
            self.mask = self.mask[:, :seen]

    def counts_at(self, seen: int) -> np.ndarray:
        """Non-padding tokens among the first ``seen`` of each sequence, int64 ``[B]``."""
        return seen - self.padding.before(seen).counts(len(self.counts))

    def at(self, rows: np.ndarray, positions: torch.Tensor) -> torch.Tensor | None:
        """Which of ``positions [b, Hkv, T]`` of the sequences ``rows`` are pinned; None if nothing is."""
        length = self.mask.shape[1]
        if length == 0:
            return None
        inside = positions < length
        mask = to_device(self.mask[rows], positions.device)
        index = positions.masked_fill(~inside, 0).flatten(1)
        return mask.gather(1, index).view(positions.shape) & inside

    def most_outside(self, rows: np.ndarray, positions: np.ndarray) -> int:
        """The most pinned tokens that a head of the sequences ``rows`` holds at others than ``positions [b, n]``.

        Pinned tokens are never dropped, so that every head holds all of them that were seen.
        """
        length = self.mask.shape[1]
        if length == 0:
            return 0
        pinned = self.mask[rows]
        seen = self.counts + self.padding.counts(len(self.counts))
        pinned &= np.arange(length) < seen[rows, None]
        for i, row in enumerate(rows):
            pinned[i, positions[i][positions[i] < length]] = False
            padding = self.padding.positions[self.padding.rows == row]
            pinned[i, padding[padding < length]] = False
        return int(pinned.sum(1).max(initial=0))

    def numbers(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """``positions [b, ...]`` of the sequences ``rows`` as they would be without padding."""
        return self.padding.numbers(rows, positions)

    def numbers_on_device(self, rows: np.ndarray, positions: torch.Tensor) -> torch.Tensor:
        """:meth:`numbers` of ``positions [b, ...]`` that lie on a device; a copy."""
        if self.padding is NO_PADDING:
            return positions.clone(memory_format=torch.contiguous_format)
        numbers = []
        for row, at in zip(rows, positions, strict=True):
            # The places of a sequence ascend: each update adds later ones.
            places = to_device(self.padding.positions[self.padding.rows == row], positions.device)
            numbers.append(at - torch.searchsorted(places, at.contiguous()))
        return torch.stack(numbers)

    def select(self, rows: np.ndarray) -> PinnedPositions:
        """A copy with the sequences ``rows`` only, which may repeat."""
        return replace(self, mask=self.mask[rows], counts=self.counts[rows], padding=self.padding.select(rows))

    def state(self) -> dict[str, torch.Tensor]:
        """The mask, the counts and the places of padding as tensors by name."""
        padding, lengths = self.padding.by_sequence(len(self.counts))
        arrays = {"pinned": self.mask, "real": self.counts, "padding": padding, "padding_lengths": lengths}
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what :meth:`state` returned.

        Raises:
            ValueError: if places of padding are not as many as the sequences have together.
        """
        mask, counts, padding, lengths = (
            state[name].numpy().copy() for name in ("pinned", "real", "padding", "padding_lengths")
        )
        self.padding = padding_by_sequence(padding, lengths)
        self.mask, self.counts = mask, counts
