"""Taking tokens back in a layer that evicts: drafts, ``crop``, and passes that were interrupted."""

from __future__ import annotations

import numpy as np

from hf_kvcache.eviction.evictor import Evictor
from hf_kvcache.layers.drafts import Undo
from hf_kvcache.layers.evicting_attention import EvictingAttention
from hf_kvcache.layers.state import CANNOT_TAKE_BACK


class EvictingRollback(EvictingAttention):
    """A layer that evicts, and can take back what drafts have evicted.

    With drafts (assisted decoding) the layer keeps a copy of its state from before the first draft. The copy is cheap:
    it shares the pages, and the dense buffer is small. Drafts evict tokens as plain decoding would. A ``crop`` returns
    to the copy, and repeats the drafted tokens that were accepted.
    """

    def activate_past_recording(self) -> None:
        if self.options.deferred:
            raise ValueError(
                f"layer {self.index} evicts, and other layers read its keys: drafts (assisted or prompt-lookup "
                "decoding) would be evicted before those layers have read them; accepted here: decoding without "
                "drafts, or a cache that does not evict"
            )
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)
        if self.storage is None:
            return
        self.flush()
        undo, self._undo = self._undo, None
        keep = self._seen + tokens_to_remove
        if tokens_to_remove and undo is not None:
            self._redo(undo, max(keep - undo.seen, 0))
        if keep < self._seen:
            self._truncate(keep)
        self.padding = self.padding.before(keep)
        self._confirm()
        self.version += 1

    def check_crop(self, tokens_to_remove: int) -> None:
        super().check_crop(tokens_to_remove)
        undo, evictor = self._undo, self.evictor
        if undo is not None:
            evictor = undo.evictor
        length = self._seen + tokens_to_remove
        redone = undo is not None and length >= undo.seen
        if tokens_to_remove and length > 0 and not redone and evictor is not None and length < evictor.evicted_at:
            raise RuntimeError(
                f"crop({tokens_to_remove!r}): layer {self.index} evicted tokens when it had seen {evictor.evicted_at}, "
                f"and a cache of {length} tokens would still hold them. Call fork() before the cache grows, or "
                "activate_past_recording() before the tokens are added."
            )

    def _begin_drafts(self) -> None:
        """Keep a copy of the state from before the first draft; the tokens that come next are drafted."""
        if self.rollback.overdue:
            self._confirm()
        if self._undo is None:
            self._undo = self._snapshot()

    def _confirm(self) -> None:
        self.flush()
        self._undo, self.rollback.unconfirmed = None, 0
        self._flush_block()

    @property
    def complete_length(self) -> int:
        return self._seen if self._attended or self._new is None else self._new.position

    def check_take_back(self, length: int) -> None:
        undone = self._undo is not None and length >= self._undo.seen
        if self.evictor is not None and not undone and length < self.evictor.evicted_at:
            raise RuntimeError(CANNOT_TAKE_BACK.format(self.index, "the tokens that were evicted meanwhile"))

    def take_back(self, length: int) -> None:
        self._store_complete(length)
        new, self._new = self._new, None
        attended, self._attended = self._attended, True
        undo, self._undo = self._undo, None
        if undo is not None:
            self._redo(undo, max(length - undo.seen, 0))
        storage, evictor = self.storage, self.evictor
        if storage is not None and evictor is not None and (undo is None or length < undo.seen):
            storage.truncate_from(length)
            if not attended and new is not None:
                # The block may hold queries of the interrupted update.
                evictor.observations.block = None
            evictor.return_to(length, storage, observed=attended)
        self._seen = length
        self.padding = self.padding.before(length)
        self._confirm()
        self.version += 1

    def _copied_evictor(self) -> Evictor | None:
        return None if self.evictor is None else self.evictor.select(np.arange(self.batch_size))

    def _snapshot(self) -> Undo:
        """The state before the first draft."""
        self.flush()
        return Undo(None if self.storage is None else self.storage.fork(), self._copied_evictor(), self._seen)

    def _redo(self, undo: Undo, tokens: int) -> None:
        """Return to the state before the drafts, and repeat the first ``tokens`` drafted tokens."""
        assert self.evictor is not None
        attending = self.evictor.attending
        if undo.storage is None:
            keys, values = undo.drafts[0].new.keys, undo.drafts[0].new.values
            self.lazy_initialization(keys, values)
        else:
            self.storage, self.evictor = undo.storage, undo.evictor
        assert self.evictor is not None
        self.evictor.attending, self._seen = attending, undo.seen
        self._undo = undo  # so that the drafts are repeated in the same parts
        for draft in undo.drafts:
            if tokens <= 0:
                break
            again = draft.part(slice(0, min(tokens, draft.new.length)))
            if draft.first:
                self._observe_first(again)
                self._store(again.new)
            else:
                self._attend_draft(again)
            self._seen += again.new.length
            tokens -= again.new.length
        self._undo = None

    def _truncate(self, length: int) -> None:
        """Remove the tokens after the first ``length`` tokens seen."""
        storage, evictor = self._held()
        before = storage.tokens()
        storage.truncate_from(length)
        removed = before - storage.tokens()
        evictor.forget(removed, storage.dense.lengths, length)
        self._seen = length
