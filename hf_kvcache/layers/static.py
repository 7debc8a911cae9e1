"""A layer with a fixed maximum length, whose steps ``torch.compile`` can take into its graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from hf_kvcache.integration.handle import HeldStates, KVHandle
from hf_kvcache.integration.masks import expect_mask
from hf_kvcache.layers.new_tokens import NewTokens, check_update
from hf_kvcache.layers.options import LayerOptions
from hf_kvcache.layers.rows import check_rows
from hf_kvcache.layers.static_attention import StaticAttention
from hf_kvcache.layers.static_ops import settings_key
from hf_kvcache.layers.static_storage import StaticStorage
from hf_kvcache.layers.static_tensors import StaticTensors


class StaticLayer(StaticAttention, CacheLayerMixin):
    """The cache of one attention layer with room for ``options.max_length`` tokens.

    All memory is allocated at the first update. Its tensors stay where they are, and hold all that changes from token
    to token. In compiled code :meth:`update` returns an object that the attention function of this package turns into
    one operator of the graph. In code that is not compiled it returns handles, like the layers without a maximum.

    Args:
        index: number of the layer in the model.
        options: the settings that all layers of the cache share; their ``max_length`` is given.
        sliding_window: number of tokens that a query sees, its own included; None for full attention.
    """

    is_compileable = True
    #: A crop cannot bring back tokens that were packed.
    is_croppable = False
    supports_early_init = True

    def __init__(self, index: int, options: LayerOptions, sliding_window: int | None = None) -> None:
        super().__init__(index, options, sliding_window)
        self.is_sliding = sliding_window is not None

    def __repr__(self) -> str:
        window = f", sliding_window={self.sliding_window}" if self.is_sliding else ""
        tokens = f"{self.get_seq_length()} of {self.max_length}"
        return f"{type(self).__name__}({self.index}, {self.options.codec!r}{window}, tokens={tokens})"

    @property
    def batch_size(self) -> int:
        """Number of sequences, or -1 before the first update."""
        return -1 if self.tensors is None else self.tensors.sizes[0]

    @property
    def keys(self) -> torch.Tensor | None:
        """All stored keys, ``[B, H, T, Dk]`` with zeros for padding; None before the first update."""
        return self._held("keys")

    @keys.setter
    def keys(self, none: torch.Tensor | None) -> None:
        pass  # transformers' base class assigns None

    @property
    def values(self) -> torch.Tensor | None:
        """All stored values, ``[B, H, T, Dv]`` with zeros for padding; None before the first update."""
        return self._held("values")

    @values.setter
    def values(self, none: torch.Tensor | None) -> None:
        pass

    def _held(self, side: str) -> torch.Tensor | None:
        if self.tensors is None:
            return None
        like = self.tensors.dense_keys if side == "keys" else self.tensors.dense_values
        batch, heads, _, width = like.shape
        return HeldStates(self, side, (batch, heads, self.get_seq_length(), width), like)

    def decompressed(self, side: str) -> torch.Tensor:
        """All stored ``"keys"`` or ``"values"``, decompressed, ``[B, H, T, D]``; zeros stand for padding."""
        return self._dense(side, self.get_seq_length())

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Add new tokens. They are stored by attention, which sees the mask that says what is padding.

        Args:
            key_states: the keys ``[B, H, T, Dk]``.
            value_states: the values ``[B, H, T, Dv]``.
            *args: ignored; transformers passes them to some layers.
            **kwargs: ignored.

        Returns:
            Handles on all keys and all values that attention may see.

        Raises:
            ValueError: if the shapes, dtypes or devices do not fit each other or the stored tokens, or there is no room
                for the tokens.
            RuntimeError: if the tokens of the update before were not read by attention.
        """
        if self.tensors is not None and self.get_seq_length() == 0 and not self.tensors.fit(key_states, value_states):
            self.tensors = self._storage = None  # after a reset; allocated anew for another batch
        check_update(self.index, self.storage, key_states, value_states, self.options.validate)
        if self._new is not None:
            self._flush(self._new, None)
        if self.tensors is None:
            self.lazy_initialization(key_states, value_states)
        storage = self.storage
        assert storage is not None
        batch, heads, length, key_dim = key_states.shape
        storage.check_room(length)
        self._new = NewTokens(key_states, value_states, storage.seen)
        self.version += 1
        # As long as the mask: see get_mask_sizes.
        self._width = self.max_length if length == 1 else storage.seen + length
        return (
            KVHandle(self, "keys", (batch, heads, self._width, key_dim), key_states),
            KVHandle(self, "values", (batch, heads, self._width, value_states.shape[3]), value_states),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for ``query_length`` new tokens covers.

        A mask of one token covers ``max_length`` tokens, so that the shapes of all steps are the same.
        """
        expect_mask(self.options)
        return (self.max_length if query_length == 1 else self.get_seq_length() + query_length), 0

    def get_max_length(self) -> int:
        """Number of tokens that a sequence can have."""
        return self.max_length

    def reset(self) -> None:
        """Drop all tokens. The memory stays; an update with another batch size allocates it anew."""
        if self.storage is not None:
            self.storage.clear()
        self._new = None
        self.version += 1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens.

        Args:
            tokens_to_remove: minus the number of tokens to remove.

        Raises:
            ValueError: if the number is positive, or larger than the number of tokens seen.
            RuntimeError: if this would need tokens that have been packed or have left a sliding window.
        """
        self.check_crop(tokens_to_remove)
        if self._new is not None:
            self._flush(self._new, None)
        storage = self.storage
        if storage is not None and tokens_to_remove:
            self._check_truncate(storage, storage.seen + tokens_to_remove)
            storage.truncate_from(storage.seen + tokens_to_remove)
            self.version += 1

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise the error that :meth:`crop` would raise."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove!r}): accepted: the number of tokens to remove as a negative int, or 0"
            )
        seen, storage = self.get_seq_length(), self.storage
        if seen + tokens_to_remove < 0:
            raise ValueError(f"crop({tokens_to_remove!r}): accepted: -{seen} to 0, the tokens seen so far")
        if storage is not None and self._new is None and tokens_to_remove:
            self._check_truncate(storage, seen + tokens_to_remove)

    def _check_truncate(self, storage: StaticStorage, length: int) -> None:
        if not storage.can_truncate(length):
            raise RuntimeError(
                f"crop({length - storage.seen}): layer {self.index} has packed or dropped tokens that would be in full "
                "precision or in the window again; accepted: fewer tokens, or reset(). A cache without max_length can "
                "be cropped further"
            )

    @property
    def complete_length(self) -> int:
        """Number of tokens seen."""
        return self.get_seq_length()

    def check_take_back(self, length: int) -> None:
        """Raise RuntimeError if the layer cannot return to the first ``length`` tokens."""
        storage = self.storage
        if storage is not None and storage.seen > length:
            self._check_truncate(storage, length)

    def take_back(self, length: int) -> None:
        """Return to the first ``length`` tokens. The update after them may have been interrupted at any point."""
        storage, self._new = self.storage, None
        if storage is not None:
            # A token whose slot is counted and that is not among those seen goes too.
            storage.truncate_from(min(length, storage.seen))
        self.version += 1

    def check_whole(self) -> None:
        """Nothing: tokens are counted only once they are stored, so no interruption can lose some."""

    def check(self) -> None:
        """Raise IntegrityError if an invariant of the storage is broken."""
        if self.storage is not None:
            self.storage.check()

    def check_rows(self, argument: str, rows: torch.Tensor) -> np.ndarray:
        """The numbers of sequences in ``rows``; see :func:`hf_kvcache.layers.rows.check_rows`."""
        return check_rows(argument, rows, self.batch_size)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace sequence ``i`` by sequence ``beam_idx[i]``, in place."""
        self._select(self.check_rows("beam_idx", beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times. The memory is allocated anew."""
        if self.tensors is not None:
            self._select(np.arange(self.batch_size).repeat(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the sequences ``indices``. Unless their number is the same, the memory is allocated anew."""
        self._select(self.check_rows("indices", indices))

    @torch.inference_mode(False)
    def _select(self, rows: np.ndarray) -> None:
        """Replace sequence ``i`` by sequence ``rows[i]``."""
        tensors, storage = self.tensors, self.storage
        if tensors is None or storage is None:
            return
        if self._new is not None:
            self._flush(self._new, None)
        chosen = tensors.select(self.settings, rows)
        if len(rows) == self.batch_size:
            for own, new in zip(tensors, chosen, strict=True):
                own.copy_(new)  # graphs know the addresses
            storage.changed()
        else:
            self.tensors, self._storage = chosen.at_fixed_addresses(), None
        self.version += 1

    @torch.inference_mode(False)
    def fork(self) -> StaticLayer:
        """An independent copy, with memory of its own."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__getstate__())
        if self.tensors is not None:
            other.tensors = StaticTensors(*(tensor.clone() for tensor in self.tensors)).at_fixed_addresses()
        other._new = None if self._new is None else self._new.copy()
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> StaticLayer:
        return self.fork()

    def __getstate__(self) -> dict[str, Any]:
        # A storage has memory addresses, which mean nothing in another process.
        return self.__dict__ | {"_storage": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.tensors is not None:
            self.tensors.at_fixed_addresses()
            settings_key(self.settings)  # graphs of this process find the settings by it

    def offload(self) -> None:
        raise NotImplementedError("a cache with max_length cannot be offloaded; use a cache without offloading")

    prefetch = offload
