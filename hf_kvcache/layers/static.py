"""A layer with a fixed maximum length, whose steps ``torch.compile`` can take into its graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.integration.compiling import TracedStates
from hf_kvcache.integration.handle import HeldStates, KVHandle
from hf_kvcache.integration.masks import expect_mask
from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.layers.new_tokens import NewTokens, check_update
from hf_kvcache.layers.options import LayerOptions
from hf_kvcache.layers.rows import check_rows
from hf_kvcache.layers.static_masks import new_valid
from hf_kvcache.layers.static_ops import attend_and_store, settings_key
from hf_kvcache.layers.static_reads import dense_states
from hf_kvcache.layers.static_storage import StaticStorage
from hf_kvcache.layers.static_tensors import Numbers, StaticSettings, StaticTensors


class StaticLayer(CacheLayerMixin):
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
    evicts = False
    takes_expansion = False

    def __init__(self, index: int, options: LayerOptions, sliding_window: int | None = None) -> None:
        super().__init__()
        self.index, self.options, self.sliding_window = index, options, sliding_window
        self.is_sliding = sliding_window is not None
        #: Incremented whenever the handles that earlier updates returned become invalid.
        self.version = 0
        self.tensors: StaticTensors | None = None
        self._new: NewTokens | None = None

    def __repr__(self) -> str:
        window = f", sliding_window={self.sliding_window}" if self.is_sliding else ""
        tokens = f"{self.get_seq_length()} of {self.max_length}"
        return f"{type(self).__name__}({self.index}, {self.options.codec!r}{window}, tokens={tokens})"

    # -- what is held ---------------------------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """Number of tokens that a sequence can have, padding included."""
        assert self.options.max_length is not None
        return self.options.max_length

    @property
    def storage(self) -> StaticStorage | None:
        """The tensors as the host reads and changes them; None before the first update."""
        return None if self.tensors is None else StaticStorage(self.tensors, self.settings)

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
        assert self.storage is not None
        return dense_states(self.storage, side, self.get_seq_length())

    # -- updates --------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate all memory, for keys and values with the shapes, dtype and device of these, ``[B, H, T, D]``.

        Raises:
            ValueError: on another device than a CPU, or if the codec cannot store such keys and values.
        """
        if key_states.device.type != "cpu":
            raise ValueError(
                f"max_length={self.max_length!r} on {key_states.device}: so far caches with a maximum length run on a "
                "CPU only; accepted there: max_length=None"
            )
        options, page_size = self.options, self.options.page_size
        self.settings = StaticSettings(
            PageEncoder(options.codec, key_states.shape[-1], value_states.shape[-1], page_size, key_states.dtype),
            # In a sliding layer the first tokens leave the window like any others.
            0 if self.is_sliding else options.sink_length,
            options.tail_length,
            self.max_length,
            self.sliding_window,
        )
        self.tensors = StaticTensors.allocate(self.settings, key_states.detach(), value_states.detach())
        self.settings_key = settings_key(self.settings)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
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
        total = self.max_length if length == 1 else storage.seen + length
        return (
            KVHandle(self, "keys", (batch, heads, total, key_dim), key_states),
            KVHandle(self, "values", (batch, heads, total, value_states.shape[3]), value_states),
        )

    def trace_update(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[Any, Any]:
        """:meth:`update` in code that is being compiled. The result is of use to the attention function only.

        Raises:
            RuntimeError: if the memory is not allocated yet.
        """
        if self.tensors is None:
            raise RuntimeError(
                "the first update of a cache with max_length was compiled, before its memory was allocated; accepted: "
                "a prompt that is not compiled (as generate() does it), or cache.early_initialization(...) before it"
            )
        if self._new is not None:
            raise RuntimeError(f"layer {self.index}: attention has not read the latest update, which was not compiled")
        states = TracedStates(self, key_states, value_states)
        return states, states

    def trace_attend(
        self,
        states: TracedStates,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
        scoring: Scoring,
    ) -> torch.Tensor:
        """Attention ``[B, T, Hq, Dv]`` in code that is being compiled: one operator, which also stores the tokens."""
        tensors = self.tensors
        assert tensors is not None
        return torch.ops.hf_kvcache.static_attend(
            query,
            states.keys,
            states.values,
            mask,
            tensors.records,
            tensors.key_mean,
            tensors.dense_keys,
            tensors.dense_values,
            tensors.page_positions,
            tensors.state,
            self.settings_key,
            causal,
            scoring.scaling,
            scoring.softcap,
            scoring.sink_logits,
        )

    @property
    def traced_length(self) -> Any:
        """Number of tokens seen, as a tensor without dimensions, for code that is being compiled; 0 at first."""
        return 0 if self.tensors is None else torch.ops.hf_kvcache.tokens_seen(self.tensors.state)

    # -- the handles' protocol ------------------------------------------------------------------------------------

    def has_history(self) -> bool:
        """Whether attention must read more than the latest update, or its mask is wider than that."""
        new = self._latest()
        return new.position > 0 or new.length == 1

    def new_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the latest update, dense ``[B, H, T, D]``."""
        new = self._latest()
        return new.keys, new.values

    def differentiable(self) -> tuple[torch.Tensor, ...]:
        """The tensors, beside the queries, that the attention over the latest update has a gradient for: none."""
        return ()

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Compute the attention of the latest update's queries over the cache, and store the new tokens.

        Args:
            call: the queries ``[B, Hq, T, Dk]`` of the T new tokens.

        Returns:
            ``[B, T, Hq, Dv]``.

        Raises:
            ValueError: if the shape of the queries does not fit that of the new keys, or the mask shows padding, of
                which nothing is held.
        """
        new, storage, query = self._latest(), self.storage, call.queries
        assert storage is not None
        if query.shape[0] != storage.batch or query.shape[2] != new.length or query.shape[1] % storage.heads:
            raise ValueError(
                f"query of shape {tuple(query.shape)} does not fit keys of shape {tuple(new.keys.shape)}; accepted: "
                "the same batch and tokens, and a multiple of the heads"
            )
        keys, values = new.keys.detach(), new.values.detach()
        output = attend_and_store(storage, query.detach(), keys, values, call.mask, call.causal, call.scoring)
        self._new = None
        return output

    def note_attended(self, call: AttentionCall) -> None:
        """Record that another function computed the attention of the latest update, and store the new tokens."""
        self._flush(self._latest(), call.mask)

    def note_dense_read(self) -> None:
        """Record that the keys and values are read as dense tensors."""
        self._latest().read = True

    def is_unread(self) -> bool:
        """Whether nothing has read the handles of the latest update, although they cover earlier tokens."""
        return self._new is not None and self._new.position > 0 and not self._new.read

    def dense_side(self, side: str) -> torch.Tensor:
        """All ``"keys"`` or ``"values"`` that attention may see, dense; zeros stand for padding and for what is to come.

        As long as the mask that :meth:`get_mask_sizes` gave the size of.
        """
        new, storage = self._latest(), self.storage
        assert storage is not None
        stop = new.position + new.length
        dense = dense_states(storage, side, self.max_length if new.length == 1 else stop)
        dense[:, :, new.position : stop] = getattr(new, side)
        return dense

    def _latest(self) -> NewTokens:
        if self._new is None:
            raise RuntimeError(f"layer {self.index}: attention was already computed for the latest update")
        return self._new

    def _flush(self, new: NewTokens, mask: torch.Tensor | None) -> None:
        """Store the tokens of the latest update."""
        storage = self.storage
        assert storage is not None
        valid = new_valid(mask, new.length, new.position, storage.batch)
        storage.store(new.keys.detach(), new.values.detach(), valid)
        self._new = None

    # -- transformers' contract -----------------------------------------------------------------------------------

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for ``query_length`` new tokens covers.

        A mask of one token covers ``max_length`` tokens, so that the shapes of all steps are the same.
        """
        expect_mask(self.options)
        return (self.max_length if query_length == 1 else self.get_seq_length() + query_length), 0

    def get_seq_length(self) -> int:
        """Number of tokens seen, padding included."""
        return 0 if self.tensors is None else int(self.tensors.state[0]) + (self._new.length if self._new else 0)

    def get_max_length(self) -> int:
        """Number of tokens that a sequence can have."""
        return self.max_length

    def reset(self) -> None:
        """Drop all tokens. The memory stays; an update with another batch size allocates it anew."""
        if self.tensors is not None:
            Numbers(self.tensors).clear()
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
        if storage is not None and storage.seen > length:
            storage.truncate_from(length)
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
        if self.tensors is None:
            return
        if self._new is not None:
            self._flush(self._new, None)
        chosen = self.tensors.select(self.settings, rows)
        if len(rows) == self.batch_size:
            for own, new in zip(self.tensors, chosen, strict=True):
                own.copy_(new)  # graphs know the addresses
        else:
            self.tensors = chosen
        self.version += 1

    @torch.inference_mode(False)
    def fork(self) -> StaticLayer:
        """An independent copy, with memory of its own."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        if self.tensors is not None:
            other.tensors = StaticTensors(*(tensor.clone() for tensor in self.tensors))
        other._new = None if self._new is None else self._new.copy()
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> StaticLayer:
        return self.fork()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.tensors is not None:
            settings_key(self.settings)  # graphs of this process find the settings by it

    def offload(self) -> None:
        raise NotImplementedError("a cache with max_length cannot be offloaded; use a cache without offloading")

    prefetch = offload
