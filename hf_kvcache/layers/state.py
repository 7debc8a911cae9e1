"""The state of a cache layer: the stored tokens, the tokens of the latest update, and the number of tokens seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels.padding import NO_PADDING, PaddingPlaces
from hf_kvcache.layers.new_tokens import NewTokens
from hf_kvcache.layers.options import LayerOptions
from hf_kvcache.layers.rollback import RollbackWindow
from hf_kvcache.layers.rows import check_rows
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.offload import OffloadTarget

#: Error of a layer that cannot return to an earlier length. Filled in with the layer's number and the missing tokens.
CANNOT_TAKE_BACK = (
    "crop(): a forward pass ended in the middle, and layer {} cannot return to its state before that pass: it no "
    "longer holds {}. Call reset()."
)


class LayerState:
    """The tokens of one attention layer.

    ``update`` sees no attention mask, so it does not know which new tokens are padding. New tokens are therefore kept
    aside, and stored after attention, which sees the mask.

    Args:
        index: number of the layer in the model.
        options: the settings that all layers of the cache share.
        sliding_window: number of tokens that a query sees, its own included; None for full attention.
    """

    device: torch.device
    dtype: torch.dtype
    #: Number of the layer among those whose pages may lie outside of the device; the cache sets it.
    offload_place = 0

    def __init__(self, index: int, options: LayerOptions, sliding_window: int | None) -> None:
        super().__init__()
        self.index, self.options, self.sliding_window = index, options, sliding_window
        #: Incremented whenever the handles that earlier updates returned become invalid.
        self.version = 0
        self.clear()

    def clear(self) -> None:
        """Drop all tokens, and begin with empty counters."""
        self.storage: PagedStorage | None = None
        self.is_initialized = False
        self._seen = 0
        self._new: NewTokens | None = None
        self.rollback = RollbackWindow(self.index, self.sliding_window)
        #: The positions of padding among the tokens seen.
        self.padding: PaddingPlaces = NO_PADDING
        self._movable = False  # whether the layer was restored without a device, so that the first update may move it
        self._checked: tuple[Any, ...] | None = None  # shapes, dtypes and device of the latest update
        #: Whether storing tokens was interrupted, by Ctrl-C or a lack of memory. Only reset() repairs that.
        self.broken = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the storage for keys and values with the shapes, dtype and device of these, ``[B, Hkv, T, D]``."""
        # In a sliding layer the first tokens leave the window like any others.
        sinks = 0 if self.sliding_window is not None else self.options.sink_length
        self.storage = self.make_storage(key_states, value_states, sinks)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @property
    def biased(self) -> bool:
        """Whether pages hold a bias per token."""
        return False

    def make_storage(
        self, key_states: torch.Tensor, value_states: torch.Tensor, sink_length: int, spare: int | None = None
    ) -> PagedStorage:
        """An empty storage for keys and values like these, with room for ``spare`` tokens beside sinks and tail."""
        options = self.options
        widths = key_states.shape[-1], value_states.shape[-1]
        encoder = PageEncoder(options.codec, *widths, options.page_size, key_states.dtype, self.biased)
        outside = self.outside(key_states.device)
        return PagedStorage(encoder, key_states, value_states, sink_length, options.tail_length, spare, outside)

    def outside(self, device: torch.device) -> tuple[OffloadTarget, int] | None:
        """Where pages lie outside of ``device``, and the number of the layer among those whose pages do, if they do."""
        target = self.options.offload
        if target is None or not target.serves(device):
            return None
        return target, self.offload_place

    @property
    def batch_size(self) -> int:
        """Number of sequences, or -1 before the first update."""
        return -1 if self.storage is None else self.storage.batch

    # -- storing --------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Store the tokens of the latest update, and pack the pages that are full and confirmed."""
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
            new.append_one_to(storage)
        elif not new.stored:
            keep_from = 0 if rollback.recording else rollback.start(self._seen)
            storage.append_block(new.keys, new.values, new.position, new.valid, not rollback.recording, keep_from)
        if not rollback.recording or rollback.overdue:
            self._confirm()

    def _confirm(self) -> None:
        """Treat all tokens as confirmed: none of them will be removed by a ``crop``."""
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
        """The numbers of sequences in ``rows``; see :func:`hf_kvcache.layers.rows.check_rows`."""
        return check_rows(argument, rows, self.batch_size)

    def is_every_row(self, rows: np.ndarray) -> bool:
        """Whether ``rows`` names all sequences, in their order."""
        return len(rows) == self.batch_size and bool((rows == np.arange(len(rows))).all())

    def select_rows(self, rows: np.ndarray) -> None:
        """Replace sequence ``i`` by sequence ``rows[i]``, for every ``i``."""
        if self.storage is None or self.is_every_row(rows):
            return
        self.flush()
        self.storage.select(rows)
        self.padding = self.padding.select(rows)
        self._checked = None
        self.version += 1

    def fork(self) -> Any:
        """An independent copy of the layer. It shares the pages, which is safe because written pages never change."""
        other = self._copy()
        other.flush()
        return other

    def _copy(self) -> Any:
        """A copy in which the tokens of the latest update are stored only if they are stored in this layer."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.storage = None if self.storage is None else self.storage.fork()
        other._new = None if self._new is None else self._new.copy()
        other.rollback = self.rollback.fork()
        return other

    def flushed(self) -> Any:
        """This layer if all of its tokens are stored, else a copy in which they are.

        Methods that only observe the layer read from the result, so that the layer itself does not change.
        """
        return self if self._new is None else self.fork()

    # -- interrupted forward passes -------------------------------------------------------------------------------

    @property
    def complete_length(self) -> int:
        """Number of tokens seen, without those of an update whose attention is known not to have finished."""
        return self._seen

    def check_take_back(self, length: int) -> None:
        """Raise RuntimeError if the layer no longer holds all tokens that it held when it had seen ``length``."""
        if self.storage is not None and self.rollback.start(length) < self.storage.writer.lost_before:
            raise RuntimeError(
                CANNOT_TAKE_BACK.format(self.index, "the tokens that have left its sliding window meanwhile")
            )

    def take_back(self, length: int) -> None:
        """Return to the first ``length`` tokens. The update after them may have been interrupted at any point."""
        self._store_complete(length)
        self._new = None
        if self.storage is not None:  # a layer without storage reads the tokens of another layer
            self._seen = length
            self.storage.truncate_from(length)
            self.padding = self.padding.before(length)
            self._confirm()
        self.version += 1

    def _store_complete(self, length: int) -> None:
        """Store the tokens of a pass that ended within the first ``length`` tokens, if they wait for other layers."""
        if self._new is not None and self._new.position + self._new.length <= length:
            self.flush()

    def note_broken(self) -> None:
        """Record that storing tokens was interrupted."""
        self.broken, self._checked = True, None  # so that the next update is checked

    def check_whole(self) -> None:
        """Raise RuntimeError if storing tokens was interrupted."""
        if self.broken:
            raise RuntimeError(
                f"layer {self.index}: an exception or Ctrl-C interrupted the storing of tokens, and some are lost "
                "or stored twice; call reset() and begin again"
            )

    def check(self) -> None:
        """Raise IntegrityError if an invariant of the storage is broken."""
        self.check_whole()
        storage = self.flushed().storage
        if storage is not None:
            storage.check()

    def _visible_length(self, new: int) -> int:
        """Number of keys that the queries of the last ``new`` tokens may see."""
        return self._seen - self.rollback.start(self._seen - new)
