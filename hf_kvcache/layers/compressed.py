"""Cache layers of DeepSeek V4, in the contract that its attention and its compressors call."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from hf_kvcache.integration.binding import is_bound
from hf_kvcache.integration.compiling import outside_graphs
from hf_kvcache.integration.compressed import CompressedHandle
from hf_kvcache.integration.masks import expect_mask
from hf_kvcache.layers.compressed_reads import CompressedReads
from hf_kvcache.layers.compressed_state import COMPRESSOR
from hf_kvcache.layers.options import LayerOptions


class WindowLayer(CompressedReads, CacheLayerMixin):
    """The cache of a layer of DeepSeek V4: the newest tokens, and what its compressors make of the others.

    The model has one KV head whose keys are values too. It calls ``update`` for the window. A layer with a compressor
    then gets its projections and gates, returns those of the windows of compression that are full, and takes the
    entries that the compressor makes of them.

    Args:
        index: number of the layer in the model.
        options: the settings that all layers of the cache share.
        sliding_window: number of tokens that a query sees in full, its own included.
        rates: for each compressor by its name in the model, the number of tokens of one of its entries; none for a
            layer that only has a window.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = True
    supports_early_init = False
    #: transformers says that the model cannot go back, which holds for its own cache. Drafts are allowed by this.
    takes_back_drafts = True

    def __init__(
        self, index: int, options: LayerOptions, sliding_window: int, rates: dict[str, int] | None = None
    ) -> None:
        super().__init__(index, options, sliding_window, rates or {})

    def __repr__(self) -> str:
        rates = "".join(f", {name}={rate}" for name, rate in self.rates.items())
        return f"{type(self).__name__}({self.index}, sliding_window={self.sliding_window}{rates}, tokens={self._seen})"

    @property
    def keys(self) -> torch.Tensor | None:
        """The rows of the window, ``[B, 1, T, D]``; None before the first update."""
        return self.window.read(self.window.start, self.window.stop).unsqueeze(1) if self.is_initialized else None

    @keys.setter
    def keys(self, none: torch.Tensor | None) -> None:
        pass  # transformers' base class assigns None

    @property
    def values(self) -> torch.Tensor | None:
        """The same as :attr:`keys`."""
        return self.keys

    @values.setter
    def values(self, none: torch.Tensor | None) -> None:
        pass

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Fix the width, dtype and device of the rows ``[B, 1, T, D]``."""
        self.window.prepare(key_states.shape[3], key_states.dtype)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the rows of new tokens to the window.

        Args:
            key_states: ``[B, 1, T, D]``.
            value_states: the same.
            *args: ignored; transformers passes them to some layers.
            **kwargs: ignored.

        Returns:
            All rows that attention may see, twice; as handles if the model is bound to this package.

        Raises:
            ValueError: if the shape, dtype or device do not fit what is held.
            RuntimeError: if the pass before ended between the update and the compressors.
        """
        self._check_update(key_states)
        if self.complete_length != self._seen:
            raise RuntimeError(
                f"layer {self.index} has seen {self._seen} tokens and its compressors {self.complete_length}: a "
                "forward pass ended in the middle. Call crop(0) to return to the last complete pass, or reset()"
            )
        self._drop_unneeded()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.device != key_states.device:
            self._move(key_states.device)
        before, rows = self._seen, key_states.squeeze(1)
        self._first_pass = not before
        self._note(rows.shape[1])
        self.version += 1
        self._visible_from, self._by_handles = self.rollback.start(before), False
        if not before:  # there is nothing else to see, and a gradient is kept
            self.window.append(rows, self.rollback.start(self._keep_from))
            return key_states, key_states
        seen = self._see_window(rows, before)
        return seen, seen

    def _see_window(self, rows: torch.Tensor, before: int) -> torch.Tensor:
        """Append ``rows``; returns all rows ``[B, 1, n, D]`` that the new queries may see."""
        batch, _, dim = rows.shape
        with_gradient = rows.requires_grad and torch.is_grad_enabled()
        if is_bound(self._config) and not with_gradient:
            self.window.append(rows)
            self._by_handles = self._unread = True
            sizes = batch, 1, self._seen - self._visible_from, dim
            return CompressedHandle(self, "window", sizes, rows)
        held = self.window.read(self._visible_from, before) if with_gradient else None
        self.window.append(rows)
        seen = self.window.read(self._visible_from, self._seen) if held is None else torch.cat([held, rows], 1)
        self._drop_unneeded()
        return seen.unsqueeze(1)

    # -- the compressors ------------------------------------------------------------------------------------------

    @outside_graphs
    def store_compression_weights(
        self, name: str, kv: torch.Tensor, gate: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Add the projections and gates ``[B, T, w]`` of new tokens to the compressor ``name``.

        Returns:
            Those of all windows that are full now and have no entry yet, ``[B, n * rate, w]``, and the position of
            their first token.
        """
        return self.compressions[name].take(kv, gate, self._keep_from)

    @outside_graphs
    def update_overlap_state(
        self, name: str, chunk_kv: torch.Tensor, chunk_gate: torch.Tensor, head_dim: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Take what the windows ``[B, n, rate, 2 * head_dim]`` hand to the next one: their first ``head_dim`` channels.

        Returns:
            What the first of these windows is handed, ``[B, rate, head_dim]``, and its gates; None for the very first.
        """
        kv, gate = chunk_kv[..., :head_dim], chunk_gate[..., :head_dim]
        return self.compressions[name].overlap(kv, gate, self._keep_from)

    @outside_graphs
    def update_compressor_states(self, name: str, compressed: torch.Tensor) -> torch.Tensor:
        """Add the entries ``compressed [B, n, D]``; returns all entries of the compressor, ``[B, T, D]``."""
        compression = self.compressions[name]
        with_gradient = compressed.requires_grad and torch.is_grad_enabled()
        earlier = compression.count
        compression.add_entries(compressed)
        if self._first_pass:
            return compressed
        if self._by_handles and name == COMPRESSOR and not with_gradient:
            batch, _, dim = compressed.shape
            return CompressedHandle(self, "entries", (batch, compression.count, dim), compressed)
        if with_gradient:
            return torch.cat([compression.entries.read(0, earlier), compressed], 1)
        return compression.entries.read(0, compression.count)

    # -- what transformers asks -----------------------------------------------------------------------------------

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset, in tokens seen, of the keys that a mask for ``query_length`` new tokens covers."""
        expect_mask(self.options)
        offset = self.rollback.start(self._seen)
        return self._seen + query_length - offset, offset

    def get_seq_length(self) -> int:
        """Number of tokens seen."""
        return self._seen

    def get_max_length(self) -> int:
        """The sliding window."""
        return self.sliding_window

    def activate_past_recording(self) -> None:
        """Hold what a :meth:`crop` needs until it confirms the new tokens."""
        self.rollback.recording = True

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace sequence ``i`` by sequence ``beam_idx[i]``."""
        self.select_rows(self.check_rows("beam_idx", beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times; the copies of a sequence lie side by side."""
        if self.is_initialized:
            self.select_rows(np.arange(self.batch_size).repeat(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the sequences ``indices``, in that order."""
        self.select_rows(self.check_rows("indices", indices))

    def offload(self) -> None:
        raise NotImplementedError(
            "a KVCache cannot be offloaded: its rows stay on the device of their layer. Use a cache without offloading"
        )

    prefetch = offload

    def __deepcopy__(self, memo: dict[int, Any]) -> WindowLayer:
        return self.fork()
