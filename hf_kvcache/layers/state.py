"""What a cache layer holds: stored tokens, those of the latest update, and how many were seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels.padding import NO_PADDING, PaddingPlaces
from hf_kvcache.layers.new_tokens import NewTokens
from hf_kvcache.layers.options import LayerOptions
from hf_kvcache.layers.rollback import RollbackWindow
from hf_kvcache.storage import PagedStorage

#: Of which layer, and what it lost.
CANNOT_TAKE_BACK = (
    "crop(): a forward pass ended in the middle, and layer {} cannot go back to what it held before: it no longer has "
    "{}. Call reset()."
)


class LayerState:
    """The tokens of one attention layer. New ones wait until attention has shown which of them are padding.

    Args:
        index: number of the layer in the model.
        options: what the layers of the cache share.
        sliding_window: tokens a query sees, itself included; None for full attention.
    """

    device: torch.device
    dtype: torch.dtype

    def __init__(self, index: int, options: LayerOptions, sliding_window: int | None) -> None:
        super().__init__()
        self.index, self.options, self.sliding_window = index, options, sliding_window
        #: Changes whenever handles given out earlier become wrong.
        self.version = 0
        self.clear()

    def clear(self) -> None:
        """Hold nothing."""
        self.storage: PagedStorage | None = None
        self.is_initialized = False
        self._seen = 0
        self._new: NewTokens | None = None
        self.rollback = RollbackWindow(self.index, self.sliding_window)
        #: Where padding stood among the tokens seen.
        self.padding: PaddingPlaces = NO_PADDING
        self._movable = False  # was restored on a device that nobody has named
        self._checked: tuple[Any, ...] | None = None  # shapes, dtypes and device of the latest update
        #: Whether storing tokens was cut off in the middle, by Ctrl-C or for want of memory: only reset() helps then.
        self.broken = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the storage for tensors like these, ``[B, Hkv, T, D]``."""
        # In a sliding layer the first tokens leave the window like any others.
        sinks = 0 if self.sliding_window is not None else self.options.sink_length
        self.storage = self.make_storage(key_states, value_states, sinks)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def make_storage(
        self, key_states: torch.Tensor, value_states: torch.Tensor, sink_length: int, spare: int | None = None
    ) -> PagedStorage:
        """An empty storage for tensors like these, with room for ``spare`` tokens beyond sinks and tail."""
        options = self.options
        encoder = PageEncoder(
            options.codec, key_states.shape[-1], value_states.shape[-1], options.page_size, key_states.dtype
        )
        return PagedStorage(encoder, key_states, value_states, sink_length, options.tail_length, spare)

    @property
    def batch_size(self) -> int:
        """Sequences held, or -1 before the first update."""
        return -1 if self.storage is None else self.storage.batch

    # -- storing --------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Store the tokens of the latest update, and pack what is due and confirmed."""
        new, storage = self._new, self.storage
        if new is None or storage is None:
            return
        self._new = None
        try:
            self._flush(new, storage)
        except BaseException:
            self.note_broken()
            raise

    def _flush(self, new: NewTokens, storage: PagedStorage) -> None:
        rollback = self.rollback
        if new.length == 1 and not new.stored:
            storage.append_one(new.keys, new.values, new.position, None if new.valid is None else new.valid[:, 0])
        elif not new.stored:
            keep_from = 0 if rollback.recording else rollback.start(self._seen)
            storage.append_block(new.keys, new.values, new.position, new.valid, not rollback.recording, keep_from)
        if not rollback.recording or rollback.overdue:
            self._confirm()

    def _confirm(self) -> None:
        """Take all tokens as confirmed: none of them will be taken back."""
        assert self.storage is not None
        self.rollback.confirm(self.storage, self._seen)

    def _latest(self) -> tuple[NewTokens, PagedStorage]:
        if self._new is None or self.storage is None:
            raise RuntimeError(
                f"layer {self.index}: attention was already computed for the latest update. A model whose layers share "
                "keys and values says so in its config (`kv_sharing_modes`); this one does not."
            )
        return self._new, self.storage

    # -- sequences and copies -------------------------------------------------------------------------------------

    def check_rows(self, argument: str, rows: torch.Tensor) -> np.ndarray:
        """``rows`` on the host; raises ValueError if one is not a sequence that the layer holds."""
        rows = torch.as_tensor(rows)
        if rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()
        if rows.is_floating_point():
            raise ValueError(f"{argument}={rows.tolist()!r}: accepted: whole numbers or booleans")
        indices = rows.cpu().numpy().astype(np.int64)
        if self.storage is None:
            return indices
        batch = self.storage.batch
        if indices.ndim != 1 or ((indices < -batch) | (indices >= batch)).any():
            raise ValueError(f"{argument}={indices.tolist()!r} is not a list of sequences; accepted: 0 to {batch - 1}")
        return np.where(indices < 0, indices + batch, indices)

    def is_every_row(self, rows: np.ndarray) -> bool:
        """Whether ``rows`` are all sequences in their order."""
        return len(rows) == self.batch_size and bool((rows == np.arange(len(rows))).all())

    def select_rows(self, rows: np.ndarray) -> None:
        """Replace the sequences by ``rows`` of them."""
        if self.storage is None or self.is_every_row(rows):
            return
        self.flush()
        self.storage.select(rows)
        self.padding = self.padding.select(rows)
        self._checked = None
        self.version += 1

    def fork(self) -> Any:
        """A copy that shares the pages, which never change once written."""
        other = self._copy()
        other.flush()
        return other

    def _copy(self) -> Any:
        """A copy whose latest update is as far as this one's."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.storage = None if self.storage is None else self.storage.fork()
        other._new = None if self._new is None else self._new.copy()
        other.rollback = self.rollback.fork()
        return other

    def flushed(self) -> Any:
        """This layer if all of its tokens are stored, else a copy where they are: for whoever only looks."""
        return self if self._new is None else self.fork()

    # -- passes that end in the middle ----------------------------------------------------------------------------

    @property
    def complete_length(self) -> int:
        """Tokens seen but for those of an update that attention is known not to have come to the end of."""
        return self._seen

    def check_take_back(self, length: int) -> None:
        """Raise RuntimeError if tokens that a pass was to add have driven out some of the first ``length``."""
        if self.storage is not None and self.rollback.start(length) < self.storage.writer.lost_before:
            raise RuntimeError(CANNOT_TAKE_BACK.format(self.index, "what has left its sliding window meanwhile"))

    def take_back(self, length: int) -> None:
        """Return to the first ``length`` tokens; the update behind them may have been cut off anywhere."""
        self._new = None
        if self.storage is not None:  # else it reads what another layer holds
            self._seen = length
            self.storage.truncate_from(length)
            self.padding = self.padding.before(length)
            self._confirm()
        self.version += 1

    def note_broken(self) -> None:
        """Take note that storing tokens was cut off in the middle."""
        self.broken, self._checked = True, None  # so that the next update looks

    def check_whole(self) -> None:
        """Raise RuntimeError if storing tokens was cut off in the middle."""
        if self.broken:
            raise RuntimeError(
                f"layer {self.index}: an exception or Ctrl-C came while tokens were stored, some of which are lost or "
                "there twice; call reset() and begin again"
            )

    def check(self) -> None:
        """Raise IntegrityError if an invariant of the storage is broken."""
        self.check_whole()
        storage = self.flushed().storage
        if storage is not None:
            storage.check()

    def _visible_length(self, new: int) -> int:
        """Keys shown to the queries of the last ``new`` tokens seen."""
        return self._seen - self.rollback.start(self._seen - new)
