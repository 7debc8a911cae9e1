"""A cache layer that evicts tokens to stay within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_kvcache.eviction.evictor import Evictor
from hf_kvcache.layers.drafts import Undo
from hf_kvcache.layers.evicting_attention import EvictingAttention
from hf_kvcache.layers.new_tokens import NewTokens
from hf_kvcache.layers.saved_state import Device
from hf_kvcache.layers.state import CANNOT_TAKE_BACK
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.gathering import can_drop_tokens
from hf_kvcache.storage.token_view import TokenView

#: Why an evicting cache is refused for some models. The name of the attention class stands before it.
ATTENDS_OUTSIDE = (
    "attends by itself and does not call the attention function that is set, so an evicting cache does not get the "
    "queries; accepted: caches that keep every token, such as QuantizedKVCache(config, bits=4) or KVCache(config)"
)


class EvictingLayer(EvictingAttention):
    """The cache of one attention layer that evicts tokens to stay within a budget.

    With drafts (assisted decoding) the layer keeps a copy of its state from before the first draft. The copy is cheap:
    it shares the pages, and the dense buffer is small. Drafts evict tokens as plain decoding would. A ``crop`` returns
    to the copy, and repeats the drafted tokens that were accepted.
    """

    optional_tensors = ("evictor.seen.", "evictor.sinks.")

    # -- transformers' contract -----------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        interval = self.eviction.interval
        storage = self.make_storage(key_states, value_states, self.options.sink_length, interval)
        if not can_drop_tokens(storage.layout):
            raise ValueError(
                f"codec={self.options.codec!r} shares a scale among some tokens of a page of {self.options.page_size}; "
                "accepted with eviction: codecs with a scale per token or per page (page_size equal to the group)"
            )
        self.evictor = self.make_evictor(storage)
        self.storage = storage
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @property
    def biased(self) -> bool:
        return self.eviction.matches

    def make_evictor(self, storage: PagedStorage) -> Evictor:
        """The evictor that chooses which tokens of ``storage`` stay."""
        return Evictor(self.eviction, self.place, storage)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._attended:
            raise self.not_attended()
        scores = self.scores_of_new(key_states)
        self._flush_prefill(key_states.shape[2])
        if self.rollback.recording:
            if self.rollback.overdue:
                self._confirm()
            if self._undo is None:
                self._undo = self._snapshot()
        handles = super().update(key_states, value_states, *args, **kwargs)
        if self._new is not None:
            self._new.scores = scores
        self._attended = False
        return handles

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

    # -- sequences, copies and saving -----------------------------------------------------------------------------

    def select_rows(self, rows: np.ndarray) -> None:
        same = self.is_every_row(rows)
        super().select_rows(rows)
        if self.evictor is not None and not same:
            self._undo = None
            self.evictor = self.evictor.select(rows)

    def fork(self) -> EvictingLayer:
        if self._new is not None and not self._attended:
            raise self.not_attended()
        return super().fork()

    def _copy(self) -> EvictingLayer:
        other = super()._copy()
        other._undo = other.watcher = other.together = None
        other.evictor = self._copied_evictor()
        return other

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"watcher": None, "together": None}

    def own_tensors(self) -> list[torch.Tensor]:
        return [] if self.evictor is None else self.evictor.tensors()

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        state = super().stored_tensors()
        if self.evictor is not None:
            state |= {f"evictor.{name}": tensor for name, tensor in self.evictor.state().items()}
        return state

    def restore(
        self, tensors: dict[str, torch.Tensor], progress: dict[str, int], device: Device = None, owned: bool = False
    ) -> None:
        super().restore(tensors, progress, device, owned)
        if self.evictor is not None:
            prefix = "evictor."
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            self.evictor.restore(own, self.device)

    # -- what the package adds ------------------------------------------------------------------------------------

    def compress(self) -> None:
        """Evict tokens down to the budget now."""
        self.flush()
        if self.storage is not None and self.evictor is not None:
            self.evictor.evict(self.storage, np.arange(self.storage.batch), self._seen)
            self._after_compression()

    def keep_only(self, keep: list[torch.Tensor], reference: Sequence[torch.Tensor] | None = None) -> None:
        """Drop the stored tokens that are False in ``keep``, which is bool ``[1, Hkv, T]`` for each sequence.

        The others are fitted to the ``reference`` queries of each sequence, ``[1, Hq, n, Dk]``, if there are any.
        """
        self.flush()
        if self.storage is not None and self.evictor is not None:
            self.evictor.keep_only(self.storage, keep, self._seen, reference)
            self._after_compression()

    def _after_compression(self) -> None:
        self._undo, self.rollback.unconfirmed = None, 0
        self.version += 1

    def kept_positions(self) -> torch.Tensor:
        """Original positions of the stored tokens, int64 ``[B, Hkv, T]``; ``-1`` fills up heads with fewer tokens."""
        storage = self.flushed().storage
        if storage is None:
            return torch.zeros(0, 0, 0, dtype=torch.int64, device="cpu")
        views = [TokenView.of(storage, np.array([row])) for row in range(storage.batch)]
        out = torch.full((storage.batch, storage.heads, max(view.tokens for view in views)), -1, device="cpu")
        for row, view in enumerate(views):
            out[row, :, : view.tokens] = view.positions.masked_fill(~view.exists, -1)[0]
        return out

    # -- storing and rolling back ---------------------------------------------------------------------------------

    def flush(self) -> None:
        if self._new is not None and self.storage is not None and not self._attended:
            raise self.not_attended()
        super().flush()

    def _flush(self, new: NewTokens, storage: PagedStorage) -> None:
        if not new.stored:
            self._store(new)
        if self._undo is None:
            self._flush_block()

    def _flush_prefill(self, new: int) -> None:
        """Evict a prompt before the first single token, or before the first draft. The update has ``new`` tokens."""
        storage, evictor = self.storage, self.evictor
        follows = new == 1 or (self.rollback.recording and self._undo is None)
        if follows and evictor is not None and evictor.schedule.ends_prompt:
            self.flush()
            together = None if self.together is None else self.together()
            if self._undo is None and storage is not None:
                if together is not None:
                    together()  # the other layers hold the whole prompt too
                else:
                    evictor.evict(storage, np.arange(storage.batch), self._seen)

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
