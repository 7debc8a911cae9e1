"""A cache layer that evicts tokens to stay within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_kvcache.eviction.evictor import Evictor
from hf_kvcache.eviction.saved_evictor import evictor_state, restore_evictor
from hf_kvcache.layers.evicting_rollback import EvictingRollback
from hf_kvcache.layers.new_tokens import NewTokens
from hf_kvcache.layers.saved_state import Device
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.gathering import can_drop_tokens
from hf_kvcache.storage.token_view import TokenView

#: Why an evicting cache is refused for some models. The name of the attention class stands before it.
ATTENDS_OUTSIDE = (
    "attends by itself and does not call the attention function that is set, so an evicting cache does not get the "
    "queries; accepted: caches that keep every token, such as QuantizedKVCache(config, bits=4) or KVCache(config)"
)


class EvictingLayer(EvictingRollback):
    """The cache of one attention layer that evicts tokens to stay within a budget."""

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
        scores = self.scores_of_new(key_states) if self.eviction.policy.needs_hidden else None
        self._flush_prefill(key_states.shape[2])
        if self.rollback.recording:
            self._begin_drafts()
        handles = super().update(key_states, value_states, *args, **kwargs)
        if self._new is not None:
            self._new.scores = scores
        self._attended = False
        return handles

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
            state |= {f"evictor.{name}": tensor for name, tensor in evictor_state(self.evictor).items()}
        return state

    def restore(
        self, tensors: dict[str, torch.Tensor], progress: dict[str, int], device: Device = None, owned: bool = False
    ) -> None:
        super().restore(tensors, progress, device, owned)
        if self.evictor is not None:
            prefix = "evictor."
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            restore_evictor(self.evictor, own, self.device)

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

    # -- storing --------------------------------------------------------------------------------------------------

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
