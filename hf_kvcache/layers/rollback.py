"""Which of a layer's newest tokens may still be taken back (assisted decoding), and what its sliding window needs."""

from __future__ import annotations

import itertools

import numpy as np

from hf_kvcache.layers.new_tokens import NewTokens
from hf_kvcache.storage import PagedStorage

#: Past this many tokens without a confirming `crop`, the oldest are taken as confirmed: nobody drafts that far ahead.
MAX_UNCONFIRMED = 512


class RollbackWindow:
    """The tokens that a ``crop`` may remove, and those that a layer must hold for it.

    Args:
        index: number of the layer, for errors.
        sliding_window: tokens a query sees, itself included; None for all.

    Attributes:
        recording: whether tokens are held back until a ``crop`` confirms them.
        unconfirmed: tokens that were added since the last one.
        kept_from: tokens before this position may be gone (sliding windows).
    """

    def __init__(self, index: int, sliding_window: int | None) -> None:
        self.index, self.sliding_window = index, sliding_window
        self.recording = False
        self.unconfirmed = 0
        self.kept_from = 0

    @property
    def overdue(self) -> bool:
        """Whether more tokens wait for a ``crop`` than anybody drafts."""
        return self.unconfirmed > MAX_UNCONFIRMED

    def start(self, seen: int) -> int:
        """Position of the first token that a query after ``seen`` tokens may see."""
        return 0 if self.sliding_window is None else max(seen - self.sliding_window + 1, 0)

    def check_crop(self, seen: int, tokens_to_remove: int) -> None:
        """Raise the error of a ``crop``, if it has one.

        Raises:
            ValueError: if the number is positive or beyond the tokens seen.
            RuntimeError: if tokens are gone that would then be in the sliding window.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove!r}): the number of tokens to remove is given as a negative int")
        length = seen + tokens_to_remove
        if length < 0:
            raise ValueError(f"crop({tokens_to_remove!r}): accepted: -{seen} to 0, the tokens seen so far")
        if self.start(length) < self.kept_from and length > 0 and tokens_to_remove:
            raise RuntimeError(
                f"crop({tokens_to_remove!r}): layer {self.index} no longer holds tokens before {self.kept_from} that "
                "its sliding window would need. Call activate_past_recording() before the tokens are added."
            )

    def confirm(self, storage: PagedStorage, seen: int) -> None:
        """Pack what is due, and let go of what has left the window: nothing seen so far will be taken back."""
        self.unconfirmed = 0
        keep_from = self.start(seen)
        storage.commit_ahead()
        storage.pack_due(keep_from)
        if keep_from:
            storage.drop_before(keep_from)
            self.kept_from = keep_from

    def segments(self, storage: PagedStorage, new: NewTokens, tail_length: int) -> list[tuple[slice, int]]:
        """The queries in runs that see the same pages, each with the number of pages packed ahead that it sees.

        While tokens may be taken back, a token is to see what it would have seen in plain decoding: a page from the
        moment on when it would have been packed.
        """
        held = storage.dense.uniform_length
        drafted = new.length <= max(1, tail_length)
        if not self.recording or held is None or new.valid is not None or not drafted or new.stored:
            return [(slice(0, new.length), storage.ahead)]
        due = storage.due(held + np.arange(new.length))
        storage.pack_ahead(int(due[-1]))
        starts = [0, *(np.flatnonzero(np.diff(due)) + 1).tolist(), new.length]
        return [(slice(a, b), int(due[a])) for a, b in itertools.pairwise(starts)]

    def fork(self) -> RollbackWindow:
        """A copy."""
        other = object.__new__(RollbackWindow)
        other.__dict__.update(self.__dict__)
        return other
