"""The state of a DeepSeek V4 layer: a window of rows that are keys and values in one, and compressed entries."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hf_kvcache.layers.compression import Compression
from hf_kvcache.layers.new_tokens import check_finite
from hf_kvcache.layers.options import LayerOptions
from hf_kvcache.layers.rollback import MAX_UNCONFIRMED, RollbackWindow
from hf_kvcache.layers.rows import check_rows
from hf_kvcache.layers.state import CANNOT_TAKE_BACK
from hf_kvcache.storage.packed_rows import PackedRows
from hf_kvcache.storage.row_buffer import RowBuffer

#: The longest update that can be taken back if the forward pass ends in the middle.
_TAKEN_BACK = 64
#: Name of the compressor whose entries attention reads; another one is an indexer's.
COMPRESSOR = "compressor"


class CompressedState:
    """Rows of the newest tokens, and the states of the layer's compressors.

    Args:
        index: number of the layer in the model.
        options: the settings that all layers of the cache share; ``options.compressed`` says how rows are packed.
        sliding_window: number of tokens that a query sees in full, its own included.
        rates: for each compressor by its name in the model, the number of tokens of one of its entries.
    """

    device: torch.device
    dtype: torch.dtype
    #: There are no pages.
    storage = None

    def __init__(self, index: int, options: LayerOptions, sliding_window: int, rates: dict[str, int]) -> None:
        super().__init__()
        assert options.compressed is not None and options.config is not None
        self._config = options.config
        self.index, self.options, self.sliding_window, self.rates = index, options, sliding_window, rates
        #: Incremented whenever the handles that earlier updates returned become invalid.
        self.version = 0
        self.clear()

    def clear(self) -> None:
        """Drop all tokens, and begin with empty counters."""
        packed = self.options.compressed
        assert packed is not None
        self.is_initialized = False
        self._seen = 0
        #: The least number of tokens that a crop may return to.
        self._keep_from = 0
        #: Whether the pass that runs is the first one. It sees its own rows and entries as the model made them.
        self._first_pass = True
        #: Whether the pass that runs is given handles, and whether attention has not read them.
        self._by_handles = self._unread = False
        #: Position of the first token that the queries of the latest update see in full.
        self._visible_from = 0
        self.rollback = RollbackWindow(self.index, self.sliding_window)
        self.window = PackedRows(packed.window, packed.rotary)
        self.compressions = {
            name: Compression(rate, packed.entries, packed.rotary)
            if name == COMPRESSOR
            else Compression(rate, packed.index, 0)
            for name, rate in self.rates.items()
        }

    @property
    def batch_size(self) -> int:
        """Number of sequences, or -1 before the first update."""
        return self.window.buffer.batch

    def _note(self, count: int) -> None:
        """Count the ``count`` tokens of an update, and find how far a crop may go back from now on."""
        before, self._seen = self._seen, self._seen + count
        self._keep_from = before if count <= _TAKEN_BACK else self._seen
        if self.rollback.recording:
            self.rollback.unconfirmed = min(self.rollback.unconfirmed + count, MAX_UNCONFIRMED)
            self._keep_from = min(self._keep_from, max(self._seen - self.rollback.unconfirmed, 0))

    def confirm(self) -> None:
        """Drop what is held only for a crop to fewer tokens than ``_keep_from``."""
        self._drop_unneeded()
        for compression in self.compressions.values():
            compression.confirm(self._keep_from)

    def _drop_unneeded(self) -> None:
        """Drop the rows of the window that neither a later query nor a crop needs."""
        self.window.buffer.drop_before(self.rollback.start(self._keep_from))
        self.rollback.kept_from = self.window.start

    # -- crop and interrupted passes ------------------------------------------------------------------------------

    @property
    def complete_length(self) -> int:
        """Number of tokens of which everything is held."""
        return min([self._seen, *(c.seen for c in self.compressions.values())])

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise the error that ``crop`` would raise; change nothing."""
        self.rollback.check_crop(self._seen, tokens_to_remove)
        length = self._seen + tokens_to_remove
        if tokens_to_remove and not self._can_return(length):
            raise RuntimeError(
                f"crop({tokens_to_remove!r}): layer {self.index} no longer holds the rows of tokens that were "
                f"compressed behind token {length}. Call activate_past_recording() before the tokens are added."
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens, and confirm the others.

        Args:
            tokens_to_remove: minus the number of tokens to remove; 0 only confirms.

        Raises:
            ValueError: if the number is positive, or larger than the number of tokens seen.
            RuntimeError: if the layer no longer holds what the earlier tokens left.
        """
        self.check_crop(tokens_to_remove)
        self._return_to(self._seen + tokens_to_remove)

    def check_take_back(self, length: int) -> None:
        """Raise RuntimeError if the layer no longer holds all that it held when it had seen ``length`` tokens."""
        if not (self._can_return(length) and self.rollback.start(length) >= self.window.start):
            raise RuntimeError(CANNOT_TAKE_BACK.format(self.index, "what is compressed or left its window meanwhile"))

    def take_back(self, length: int) -> None:
        """Return to the first ``length`` tokens. The update after them may have been interrupted at any point."""
        self._return_to(length)

    def check_whole(self) -> None:
        """Raise RuntimeError if rows were lost: never, since an update counts rows after it has written them."""

    def _can_return(self, length: int) -> bool:
        return all(compression.can_return(length) for compression in self.compressions.values())

    def _return_to(self, length: int) -> None:
        if not length:  # the rows that are held may begin later
            recording = self.rollback.recording
            self.reset()
            self.rollback.recording = recording
            return
        self._seen = self._keep_from = length
        self.rollback.unconfirmed, self._unread = 0, False
        self.window.buffer.truncate(length)
        for compression in self.compressions.values():
            compression.truncate(length)
        self.confirm()
        self.version += 1

    # -- sequences and copies -------------------------------------------------------------------------------------

    def check_rows(self, argument: str, rows: torch.Tensor) -> np.ndarray:
        """The numbers of sequences in ``rows``; see :func:`hf_kvcache.layers.rows.check_rows`."""
        return check_rows(argument, rows, self.batch_size)

    def select_rows(self, rows: np.ndarray) -> None:
        """Replace sequence ``i`` by sequence ``rows[i]``, for every ``i``."""
        every = len(rows) == self.batch_size and bool((rows == np.arange(len(rows))).all())
        if self.is_initialized and not every:
            for buffer in self._buffers().values():
                buffer.select(rows)
            self.version += 1

    def fork(self) -> Any:
        """An independent copy. Both read the same tensors until one of them adds to these."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.window = self.window.fork()
        other.compressions = {name: compression.fork() for name, compression in self.compressions.items()}
        other.rollback = self.rollback.fork()
        return other

    def _buffers(self) -> dict[str, RowBuffer]:
        found = {"window": self.window.buffer}
        for name, compression in self.compressions.items():
            found |= {f"{name}.{part}": buffer for part, buffer in compression.buffers().items()}
        return found

    # -- memory ---------------------------------------------------------------------------------------------------

    def bytes_by_part(self) -> dict[str, int]:
        """Bytes by the parts of a memory report. Rows that are not packed are full-precision tokens, or codes."""
        parts = dict.fromkeys(("codes", "scales", "tail", "other", "slack"), 0)
        for name, rows in self._packed().items():
            for part, size in rows.bytes_by_part().items():
                parts["tail" if name == "window" and part == "codes" and rows.encoder is None else part] += size
        for name, buffer in self._buffers().items():
            if name not in self._packed():
                parts["other"] += buffer.used_bytes()
                parts["slack"] += buffer.allocated_bytes() - buffer.used_bytes()
        return parts

    def packed_elements(self) -> int:
        """Number of elements in packed rows."""
        return sum(len(r.buffer) * r.buffer.batch * r.width for r in self._packed().values() if r.encoder is not None)

    def full_elements(self) -> int:
        """Number of elements that transformers' own layer would hold for the same tokens."""
        rows = min(self._seen, self.sliding_window - 1) * self.window.width
        for compression in self.compressions.values():
            rows += compression.full_elements()
        return rows * self.batch_size

    def blank(self) -> Any:
        """An empty layer with the same settings."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.reset()
        return other

    def reset(self) -> None:
        """Drop all tokens. The next update may have another batch size."""
        self.clear()
        self.version += 1

    def _packed(self) -> dict[str, PackedRows]:
        return {"window": self.window} | {f"{n}.entries": c.entries for n, c in self.compressions.items()}

    def _check_update(self, states: torch.Tensor) -> None:
        """Raise ValueError unless new rows ``[B, 1, T, D]`` go with those that are held."""
        if states.dim() != 4 or states.shape[1] != 1 or not states.shape[2] or not states.is_floating_point():
            raise ValueError(
                f"key_states {list(states.shape)} {states.dtype}: accepted: floating [batch, 1, tokens, dim], at least "
                "one token: keys that are values too"
            )
        if self.options.validate:
            check_finite(states, states, f" of layer {self.index}")
        held = self.batch_size, self.window.width, self.window.dtype
        given = states.shape[0], states.shape[3], states.dtype
        if self.is_initialized and held != given:
            raise ValueError(
                f"key_states {list(states.shape)} {states.dtype} does not go with what layer {self.index} holds: batch "
                f"{held[0]}, 1 head, dim {held[1]}, {held[2]}. Call reset(), or use a cache of its own for each batch "
                "and model."
            )
