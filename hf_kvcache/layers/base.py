"""transformers' cache-layer contract over paged storage."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from hf_kvcache.integration.handle import KVHandle, carrying_gradient
from hf_kvcache.integration.masks import expect_mask
from hf_kvcache.layers.new_tokens import NewTokens, check_update
from hf_kvcache.layers.options import LayerOptions
from hf_kvcache.layers.saved_state import SavedState


class KVCacheLayer(SavedState, CacheLayerMixin):
    """One attention layer's cache.

    Args:
        index: number of the layer in the model.
        options: what the layers of the cache share.
        sliding_window: tokens a query sees, itself included; None for full attention.
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
        """All keys that are held, ``[B, Hkv, T, Dk]`` with zeros for padding; None before the first.

        For code that looks into the layers of any cache. They are decompressed by whoever computes with them.
        """
        return self.held_states("keys")

    @keys.setter
    def keys(self, none: torch.Tensor | None) -> None:
        pass  # the base class declares it so

    @property
    def values(self) -> torch.Tensor | None:
        """All values that are held, ``[B, Hkv, T, Dv]`` with zeros for padding; None before the first."""
        return self.held_states("values")

    @values.setter
    def values(self, none: torch.Tensor | None) -> None:
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in new tokens ``[B, Hkv, T, D]``; returns handles on all keys and values that attention may see.

        Raises:
            ValueError: if the tensors do not go with each other or with what the layer holds.
        """
        two = key_states.dtype != value_states.dtype
        if two and key_states.is_floating_point() and value_states.is_floating_point():
            # Under autocast a rotary embedding leaves keys in float32, and values come in the narrower dtype.
            both = torch.promote_types(key_states.dtype, value_states.dtype)
            key_states, value_states = key_states.to(both), value_states.to(both)
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
        self._checked = kind
        given = None
        if key_states.requires_grad or value_states.requires_grad:
            # What is stored carries no gradient; attention of a first forward pass gets it all the same.
            given = key_states, value_states
            key_states, value_states = key_states.detach(), value_states.detach()
        self._new = NewTokens(key_states, value_states, self._seen, given=given)
        self._seen += key_states.shape[2]
        if self.rollback.recording:
            self.rollback.unconfirmed += key_states.shape[2]
        self.version += 1
        return self._handles_on(self._new)

    def _handles_on(self, new: NewTokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Handles on all keys and values that the queries of the new tokens may see."""
        batch, heads, count, key_dim = new.keys.shape
        length = self._seen if self.sliding_window is None else self._visible_length(count)
        keys = KVHandle(self, "keys", (batch, heads, length, key_dim), new.keys)
        values = KVHandle(self, "values", (batch, heads, length, new.values.shape[3]), new.values)
        if new.given is not None and torch.is_grad_enabled():
            exact = new.position == 0
            return carrying_gradient(keys, new.given[0], exact), carrying_gradient(values, new.given[1], exact)
        return keys, values

    def has_history(self) -> bool:
        """Whether attention has to look at anything but the tokens of the latest update."""
        new = self._new
        if new is None:
            new, _ = self._latest()  # which raises
        return new.position > 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for ``query_length`` new tokens covers, in tokens seen."""
        expect_mask(self.options)
        offset = self.rollback.start(self._seen)
        return self._seen + query_length - offset, offset

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self._seen

    def get_max_length(self) -> int:
        """The sliding window, or -1: no maximum."""
        return self.sliding_window or -1

    def activate_past_recording(self) -> None:
        """Hold back packing until :meth:`crop` confirms the tokens."""
        self.rollback.recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens and confirm the others.

        Raises:
            ValueError: if the number is positive or beyond the tokens seen.
            RuntimeError: if a sliding layer no longer holds the tokens that would then be in its window.
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
        """Raise the error of :meth:`crop`, if it has one."""
        self.rollback.check_crop(self._seen, tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace sequence ``i`` by sequence ``beam_idx[i]``."""
        self.select_rows(self.check_rows("beam_idx", beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times, copies side by side."""
        if self.storage is not None:
            self.select_rows(np.arange(self.batch_size).repeat(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences ``indices`` only, in that order."""
        self.select_rows(self.check_rows("indices", indices))

    def offload(self) -> None:
        raise NotImplementedError("a KVCache holds its pages on the device of their layer; offloading is not available")

    prefetch = offload

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCacheLayer:
        # Pages are immutable, so a fork is as independent as a copy of every byte.
        return self.fork()
