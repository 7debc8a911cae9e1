"""transformers' cache-layer contract over paged storage."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from hf_kvcache.integration.handle import KVHandle, attach_gradient
from hf_kvcache.integration.masks import expect_mask
from hf_kvcache.layers.new_tokens import NewTokens, check_update
from hf_kvcache.layers.options import LayerOptions
from hf_kvcache.layers.saved_state import SavedState
from hf_kvcache.storage.page_writer import make_room


class KVCacheLayer(SavedState, CacheLayerMixin):
    """The cache of one attention layer.

    Args:
        index: number of the layer in the model.
        options: the settings that all layers of the cache share.
        sliding_window: number of tokens that a query sees, its own included; None for full attention.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, index: int, options: LayerOptions, sliding_window: int | None = None) -> None:
        super().__init__(index, options, sliding_window)
        self.is_sliding = sliding_window is not None

    def __repr__(self) -> str:
        window = f", sliding_window={self.sliding_window}" if self.is_sliding else ""
        return f"{type(self).__name__}({self.index}, {self.options.codec!r}{window}, tokens={self._seen})"

    @property
    def keys(self) -> torch.Tensor | None:
        """All stored keys, ``[B, Hkv, T, Dk]`` with zeros for padding; None before the first update.

        This is for code that looks into the layers of any cache. The keys are decompressed when they are used.
        """
        return self.held_states("keys")

    @keys.setter
    def keys(self, none: torch.Tensor | None) -> None:
        pass  # transformers' base class assigns None

    @property
    def values(self) -> torch.Tensor | None:
        """All stored values, ``[B, Hkv, T, Dv]`` with zeros for padding; None before the first update."""
        return self.held_states("values")

    @values.setter
    def values(self, none: torch.Tensor | None) -> None:
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new tokens.

        Args:
            key_states: the keys ``[B, Hkv, T, Dk]``.
            value_states: the values ``[B, Hkv, T, Dv]``.
            *args: ignored; transformers passes them to some layers.
            **kwargs: ignored.

        Returns:
            Handles on all keys and all values that attention may see.

        Raises:
            ValueError: if the shapes, dtypes or devices do not fit each other or the stored tokens.
            RuntimeError: if storing tokens was interrupted earlier.
        """
        mixed = key_states.dtype != value_states.dtype
        if mixed and key_states.is_floating_point() and value_states.is_floating_point():
            # Under autocast a rotary embedding leaves keys in float32, and values come in the narrower dtype.
            wider = torch.promote_types(key_states.dtype, value_states.dtype)
            key_states, value_states = key_states.to(wider), value_states.to(wider)
        kind = (key_states.shape, value_states.shape, key_states.dtype, value_states.dtype, key_states.device)
        if kind != self._checked or self.options.validate or value_states.device != key_states.device:
            self.check_whole()
            if self._movable:
                self._move(key_states.device)
            check_update(self.index, self.storage, key_states, value_states, self.options.validate)
        if self._new is not None:
            self.flush()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.options.offload is not None:
            self._make_room(key_states.shape[2])
        self._checked = kind
        with_gradient = None
        if key_states.requires_grad or value_states.requires_grad:
            # Stored tokens carry no gradient. The attention of a first forward pass reads the tensors that do.
            with_gradient = key_states, value_states
            key_states, value_states = key_states.detach(), value_states.detach()
        self._new = NewTokens(key_states, value_states, self._seen, with_gradient=with_gradient)
        self._seen += key_states.shape[2]
        if self.rollback.recording:
            self.rollback.unconfirmed += key_states.shape[2]
        self.version += 1
        length = self._seen if self.sliding_window is None else self._visible_length(key_states.shape[2])
        handles = KVHandle.of_both(self, key_states, value_states, length)
        if with_gradient is not None and torch.is_grad_enabled():
            exact = self._new.position == 0
            keys, values = (attach_gradient(*pair, exact) for pair in zip(handles, with_gradient, strict=True))
            return keys, values
        return handles

    def has_history(self) -> bool:
        """Whether attention must read tokens that were added before the latest update."""
        new = self._new
        if new is None:
            new, _ = self._latest()  # which raises
        return new.position > 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset, in tokens seen, of the keys that a mask for ``query_length`` new tokens covers."""
        expect_mask(self.options)
        offset = self.rollback.start(self._seen)
        return self._seen + query_length - offset, offset

    def get_seq_length(self) -> int:
        """Number of tokens seen, padding included."""
        return self._seen

    def get_max_length(self) -> int:
        """The sliding window, or -1 if there is no maximum."""
        return self.sliding_window or -1

    def activate_past_recording(self) -> None:
        """Leave new tokens unpacked until a :meth:`crop` confirms them."""
        self.rollback.recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens, and confirm the others.

        Args:
            tokens_to_remove: minus the number of tokens to remove; 0 only confirms.

        Raises:
            ValueError: if the number is positive, or larger than the number of tokens seen.
            RuntimeError: if a sliding layer no longer holds tokens that would be in its window afterwards.
        """
        self.check_crop(tokens_to_remove)
        if self.storage is None:
            return
        self.flush()
        self._seen += tokens_to_remove
        if tokens_to_remove:
            self.storage.truncate_from(self._seen)
            self.padding = self.padding.before(self._seen)
        self._confirm()
        self.version += 1

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise the error that :meth:`crop` would raise; change nothing."""
        self.rollback.check_crop(self._seen, tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace sequence ``i`` by sequence ``beam_idx[i]``."""
        self.select_rows(self.check_rows("beam_idx", beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times; the copies of a sequence lie side by side."""
        if self.storage is not None:
            self.select_rows(np.arange(self.batch_size).repeat(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the sequences ``indices``, in that order."""
        self.select_rows(self.check_rows("indices", indices))

    def offload(self) -> None:
        """Let go of what was fetched of pages outside of the device. They are there since they were packed."""
        self._check_offloads("offload()")
        if self.storage is not None and self.storage.reader.fetch is not None:
            self.storage.reader.fetch.leave(self.storage.table)

    def prefetch(self) -> None:
        """Begin to fetch pages from outside of the device, without waiting for them."""
        self._check_offloads("prefetch()")
        if self.storage is not None and self.storage.reader.fetch is not None:
            self.storage.reader.fetch.begin(self.storage.table)

    def fetch_ahead(self, tokens: int) -> None:
        """The layer before runs, with so many new ``tokens``: begin to fetch what this one will need from outside."""
        if self.storage is not None and self.storage.reader.fetch is not None:
            self.storage.reader.fetch.ahead(self.storage.table)

    def _check_offloads(self, what: str) -> None:
        if self.options.offload is None:
            raise NotImplementedError(
                f"{what}: the pages of this KVCache stay on the device of their layer; accepted: a cache that was "
                "built with offload='cpu' or offload=<folder>"
            )

    def _make_room(self, tokens: int) -> None:
        """Have room for the pages of new tokens outside of the device; raises OSError before anything is stored."""
        assert self.storage is not None and self.options.offload is not None
        self.options.offload.check_process()
        if self.storage.reader.fetch is None or self.evicts:
            return  # what is evicted is not packed, and what stays of the rest takes little
        try:
            make_room(self.storage.writer, tokens, self.sliding_window)
        except BaseException:
            if self._seen == 0:
                self.clear()
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCacheLayer:
        # Pages are immutable, so a fork is as independent as a copy of every byte.
        return self.fork()
