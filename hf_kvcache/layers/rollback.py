"""Which of the newest tokens a ``crop`` may still remove (assisted decoding), and what the sliding window needs."""

from __future__ import annotations

import itertools

import numpy as np

from hf_kvcache.layers.new_tokens import NewTokens
from hf_kvcache.storage import PagedStorage

#: After this many tokens without a `crop`, all tokens count as confirmed, because no drafts are that long.
MAX_UNCONFIRMED = 512


class RollbackWindow:
    """Counts the tokens that a ``crop`` may remove, and the tokens that a layer must hold until then.

    Args:
        index: number of the layer in the model, for errors.
        sliding_window: number of tokens that a query sees, its own included; None for full attention.

    Attributes:
        recording: whether tokens stay unpacked until a ``crop`` confirms them.
        unconfirmed: number of tokens that were added since the last ``crop``.
        kept_from: position before which tokens of a sliding window may have been dropped.
    """

    def __init__(self, index: int, sliding_window: int | None) -> None:
        self.index, self.sliding_window = index, sliding_window
        self.recording = False
        self.unconfirmed = 0
        self.kept_from = 0

    @property
    def overdue(self) -> bool:
        """Whether more tokens are unconfirmed than drafts can have."""
        return self.unconfirmed > MAX_UNCONFIRMED

    def start(self, seen: int) -> int:
        """Position of the first token that the query at position ``seen`` may see."""
        return 0 if self.sliding_window is None else max(seen - self.sliding_window + 1, 0)

    def check_crop(self, seen: int, tokens_to_remove: int) -> None:
        """Raise the error that a ``crop`` would raise.

        Args:
            seen: number of tokens seen.
            tokens_to_remove: minus the number of tokens to remove; 0 only confirms.

        Raises:
            ValueError: if the number is positive, or larger than the number of tokens seen.
            RuntimeError: if tokens were dropped that would be in the sliding window afterwards.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove!r}): accepted: the number of tokens to remove as a negative int, or 0"
            )
        length = seen + tokens_to_remove
        if length < 0:
            raise ValueError(f"crop({tokens_to_remove!r}): accepted: -{seen} to 0, the tokens seen so far")
        if self.start(length) < self.kept_from and length > 0 and tokens_to_remove:
            raise RuntimeError(
                f"crop({tokens_to_remove!r}): layer {self.index} no longer holds tokens before {self.kept_from} that "
                "its sliding window would need. Call activate_past_recording() before the tokens are added."
            )

    def confirm(self, storage: PagedStorage, seen: int) -> None:
        """Confirm all tokens seen: pack full pages, and drop tokens that have left the sliding window."""
        self.unconfirmed = 0
        keep_from = self.start(seen)
        storage.commit_ahead()
        storage.pack_due(keep_from)
        if keep_from:
            storage.drop_before(keep_from)
            self.kept_from = keep_from

    def segments(self, storage: PagedStorage, new: NewTokens, tail_length: int) -> list[tuple[slice, int]]:
        """Split the queries of an update into segments that see the same pages.

        With drafts, each token sees what it would see in plain decoding: a page counts as packed from the token on at
        which plain decoding would pack it. Such pages are packed ahead, and committed when the tokens are confirmed.

        Args:
            storage: the stored tokens.
            new: the tokens of the update.
            tail_length: number of newest tokens that stay in full precision.

        Returns:
            For each segment its queries, and the number of pages packed ahead that they see.
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
        """An independent copy."""
        other = object.__new__(RollbackWindow)
        other.__dict__.update(self.__dict__)
        return other
