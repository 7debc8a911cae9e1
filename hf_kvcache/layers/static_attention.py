"""The state of a layer with a fixed maximum length, and attention over it, compiled and not."""

from __future__ import annotations

from typing import Any

import torch

from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.integration.compiling import TracedStates
from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.layers.new_tokens import NewTokens, check_fits
from hf_kvcache.layers.options import LayerOptions
from hf_kvcache.layers.static_masks import new_valid
from hf_kvcache.layers.static_ops import attend_and_store, settings_key
from hf_kvcache.layers.static_reads import dense_states
from hf_kvcache.layers.static_storage import StaticStorage, storage_of
from hf_kvcache.layers.static_tensors import StaticSettings, StaticTensors


class StaticAttention:
    """The tokens of one attention layer with room for ``options.max_length`` of them.

    Args:
        index: number of the layer in the model.
        options: the settings that all layers of the cache share; their ``max_length`` is given.
        sliding_window: number of tokens that a query sees, its own included; None for full attention.
    """

    evicts = False
    takes_expansion = False
    is_initialized: bool
    settings: StaticSettings

    def __init__(self, index: int, options: LayerOptions, sliding_window: int | None = None) -> None:
        super().__init__()
        self.index, self.options, self.sliding_window = index, options, sliding_window
        #: Incremented whenever the handles that earlier updates returned become invalid.
        self.version = 0
        self.tensors: StaticTensors | None = None
        self._storage: StaticStorage | None = None
        self._new: NewTokens | None = None
        #: The length of the handles of the latest update.
        self._width = 0

    @property
    def max_length(self) -> int:
        """Number of tokens that a sequence can have, padding included."""
        assert self.options.max_length is not None
        return self.options.max_length

    @property
    def storage(self) -> StaticStorage | None:
        """The tensors as the host reads and changes them, which waits for a GPU; None before the first update."""
        if self.tensors is None:
            return None
        if self._storage is None or self._storage.tensors is not self.tensors:
            self._storage = storage_of(self.tensors, self.settings)
        self._storage.numbers.read()
        return self._storage

    @torch.inference_mode(False)
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate all memory, for keys and values with the shapes, dtype and device of these, ``[B, H, T, D]``.

        Raises:
            ValueError: if the codec cannot store such keys and values, or there are no kernels for such steps on a
                device that is not a CPU.
        """
        tensors = self.allocate(key_states.detach(), value_states.detach())
        if not tensors.state.is_cpu:
            self._check_kernels(tensors)
        self.tensors = tensors.at_fixed_addresses()
        self.settings_key = settings_key(self.settings)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def allocate(self, keys: torch.Tensor, values: torch.Tensor) -> StaticTensors:
        """The memory for keys and values with the shapes, dtype and device of these; notes the settings."""
        options, page_size = self.options, self.options.page_size
        self.settings = StaticSettings(
            PageEncoder(options.codec, keys.shape[-1], values.shape[-1], page_size, keys.dtype),
            # In a sliding layer the first tokens leave the window like any others.
            options.sink_length if self.sliding_window is None else 0,
            options.tail_length,
            self.max_length,
            self.sliding_window,
            options.validate,
        )
        return StaticTensors.allocate(self.settings, keys, values)

    def _check_kernels(self, tensors: StaticTensors) -> None:
        """Raise ValueError unless there are kernels for steps on the device of the tensors, a GPU."""
        given, device = f"max_length={self.max_length!r} on {tensors.state.device}", tensors.state.device
        if self.options.validate:
            raise ValueError(f"validate=True with {given}: a step would wait for the device; accepted: validate=False")
        backend = implementation("static_step", device)
        if backend is None or not backend.supports_state(tensors.for_kernels(self.settings)):
            why = "the Triton kernels cannot run" if backend is None else "they have no kernels for these pages"
            raise ValueError(
                f"{given} with codec {self.options.codec!r}, pages of {self.options.page_size} tokens and keys of "
                f"{tensors.dense_keys.shape[3]} channels in {tensors.dense_keys.dtype}: {why}; accepted: "
                "max_length=None, or another codec or page_size"
            )
        backend.warm_up(tensors.for_kernels(self.settings))

    def trace_update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, final: StaticAttention
    ) -> tuple[Any, Any]:
        """:meth:`update` in code that is being compiled. The result is of use to the attention function only.

        Args:
            key_states: the keys ``[B, H, T, Dk]``.
            value_states: the values ``[B, H, T, Dv]``.
            final: the layer that a forward pass comes to last.

        Raises:
            ValueError: if the shapes or dtypes do not fit the memory.
            RuntimeError: if the memory is not allocated yet.
        """
        held = self._allocated()
        check_fits(self.index, (held.dense_keys, held.dense_values), key_states, value_states)
        if self._new is not None:
            raise RuntimeError(f"layer {self.index}: attention has not read the latest update, which was not compiled")
        states = TracedStates(self, key_states, value_states, final._allocated().state)
        return states, states

    def trace_attend(
        self,
        states: TracedStates,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
        scoring: Scoring,
    ) -> torch.Tensor:
        """Attention ``[B, T, Hq, Dv]`` in code that is being compiled: one operator, which also stores the tokens.

        Raises:
            RuntimeError: if a gradient is wanted, or the memory is not allocated yet.
        """
        if torch.is_grad_enabled() and query.requires_grad:
            raise RuntimeError(
                "a compiled step of a cache with max_length has no gradient; accepted: with torch.no_grad() or "
                "torch.inference_mode() around it"
            )
        tensors = self._allocated()
        return torch.ops.hf_kvcache.static_attend(
            query,
            states.keys,
            states.values,
            mask,
            tensors.records,
            tensors.key_basis,
            tensors.dense_keys,
            tensors.dense_values,
            tensors.page_positions,
            tensors.state,
            states.final,
            self.settings_key,
            causal,
            scoring.scaling,
            scoring.softcap,
            scoring.sink_logits,
        )

    @property
    def traced_length(self) -> Any:
        """Number of tokens seen, as a tensor without dimensions, for code that is being compiled.

        Raises:
            RuntimeError: if the memory is not allocated yet.
        """
        return torch.ops.hf_kvcache.tokens_seen(self._allocated().state)

    def _allocated(self) -> StaticTensors:
        if self.tensors is None:
            raise RuntimeError(
                "the first update of a cache with max_length is being compiled, before its memory is allocated; "
                "accepted: a prompt that is not compiled (as generate() does it), or cache.early_initialization(...) "
                "before it"
            )
        return self.tensors

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
        self._flush(self._latest(), call.mask, call.query)

    def note_dense_read(self) -> None:
        """Record that the keys and values are read as dense tensors."""
        if self._new is not None:
            self._new.read = True

    def is_unread(self) -> bool:
        """Whether nothing has read the handles of the latest update, although they cover earlier tokens."""
        return self._new is not None and self._new.position > 0 and not self._new.read

    def dense_side(self, side: str) -> torch.Tensor:
        """All ``"keys"`` or ``"values"`` that attention may see, dense, zeros for padding and for tokens to come.

        They are as long as the mask of these queries.
        """
        return self._dense(side, self._width)

    def _dense(self, side: str, length: int) -> torch.Tensor:
        """The tokens at the positions before ``length``, dense, those of the latest update among them."""
        new, storage = self._new, self.storage
        assert storage is not None
        dense = dense_states(storage, side, length)
        if new is not None:
            dense[:, :, new.position : new.position + new.length] = getattr(new, side)
        return dense

    def _latest(self) -> NewTokens:
        if self._new is None:
            raise RuntimeError(f"layer {self.index}: attention was already computed for the latest update")
        return self._new

    def _flush(self, new: NewTokens, mask: torch.Tensor | None, query: torch.Tensor | None = None) -> None:
        """Store the tokens of the latest update, whose queries may be known."""
        storage = self.storage
        assert storage is not None
        valid = new_valid(mask, new.length, new.position, storage.batch)
        if query is not None:
            storage.balance(query.detach(), new.keys.detach(), valid)
        storage.store(new.keys.detach(), new.values.detach(), valid)
        self._new = None

    def get_seq_length(self) -> int:
        """Number of tokens seen, padding included."""
        return 0 if self.tensors is None else int(self.tensors.state[0]) + (self._new.length if self._new else 0)
