"""When a layer evicts: behind a prompt, and whenever a tail has grown by so many decoded tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hf_kvcache.eviction.options import EvictionOptions
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.token_view import TokenView

_NONE = np.zeros(0, np.int64)


@dataclass
class EvictionSchedule:
    """Says when tokens are to be chosen or packed, and remembers when that was done.

    Attributes:
        options: what the layers share.
        pending: whether a prompt is held that was not evicted yet.
        evictions: choices that dropped something.
        evicted_at: tokens seen at the latest of these choices.
    """

    options: EvictionOptions
    pending: bool = False
    evictions: int = 0
    evicted_at: int = 0

    def note(self, position: int, length: int, drafted: bool) -> None:
        """Take note of ``length`` tokens from ``position`` on: a prompt, or decoded tokens that may be ``drafted``."""
        self.pending |= position == 0 or (length > 1 and not drafted)

    @property
    def waits(self) -> bool:
        """Whether a prompt is held that nobody may choose from, or pack, before ``compress()``."""
        return self.pending and self.options.evict_prefill is None and self.options.interval is None

    @property
    def ends_prompt(self) -> bool:
        """Whether the prompt held is to be evicted before the first token behind it."""
        return self.pending and self.options.evict_prefill == "end"

    def after_update(self) -> Literal["choose", "pack", "due"] | None:
        """What an update calls for once attention has used its tokens.

        Returns:
            ``"choose"`` for a choice in every sequence; ``"pack"`` to pack what may be packed and drop nothing;
            ``"due"`` for the sequences of :meth:`due`; None while a prompt waits.
        """
        if not self.pending:
            return "due"
        if self.options.evict_prefill == "chunk":
            return "choose"
        return "pack" if self.options.evict_prefill is None and not self.waits else None

    def step(self, storage: PagedStorage) -> int:
        """Tokens by which a tail grows before some of it is packed."""
        return self.options.interval or storage.page_size

    def room(self, storage: PagedStorage) -> int:
        """Tokens that can be added before a sequence is due; at least 1."""
        return 1 << 30 if self.waits else max(1, self._full(storage) - storage.dense.longest)

    def due(self, storage: PagedStorage) -> np.ndarray:
        """The sequences whose tail has grown by a step; none while a prompt waits."""
        full = self._full(storage)
        if storage.dense.longest < full or self.waits:
            return _NONE
        return np.flatnonzero(storage.dense.lengths >= full)

    def tail(self, held: TokenView, dropped: bool) -> int:
        """Tokens that stay in the tail; where none is ``dropped``, as many as if tokens had come one by one.

        So the tokens at which evictions fall due do not depend on how many tokens an update has.
        """
        storage, least = held.storage, held.storage.tail_length
        return least if dropped else least + max(held.used - storage.sink_length - least, 0) % self.step(storage)

    def note_eviction(self, seen: int) -> None:
        """Take note that tokens were dropped after ``seen`` tokens in all."""
        self.evictions += 1
        self.evicted_at = seen

    def return_to(self, seen: int) -> None:
        """Take note that all behind the first ``seen`` tokens is gone."""
        self.evicted_at = min(self.evicted_at, seen)

    def _full(self, storage: PagedStorage) -> int:
        """Slots of the dense buffer that a sequence uses when it is due."""
        return storage.sink_length + storage.tail_length + self.step(storage)
