"""The tensors that ``update`` returns. Each knows its layer, and is decompressed only if an operation reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only

from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.kernels.attention import NO_GRADIENT


class CachedStates(Protocol):
    """The keys and values behind a handle, as handles and the attention function use them.

    Two classes implement this protocol: a layer of a cache, and the expansion of a layer's latents.
    """

    @property
    def version(self) -> int:
        """A number that is incremented whenever earlier handles become invalid."""

    @property
    def evicts(self) -> bool:
        """Whether the layer drops tokens that a query may see."""

    @property
    def takes_expansion(self) -> bool:
        """Whether the layer holds latents that the model expands to keys and values."""

    def has_history(self) -> bool:
        """Whether attention must read tokens that were added before the latest update."""

    def new_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the latest update, dense ``[B, Hkv, T, D]``, with their gradient if there is one."""

    def differentiable(self) -> tuple[torch.Tensor, ...]:
        """The tensors, beside the queries, that the attention over the latest update has a gradient for."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attention ``[B, T, Hq, Dv]`` of the latest update's queries over all tokens."""

    def note_attended(self, call: AttentionCall) -> None:
        """Record that another function computed the attention of the latest update."""

    def note_dense_read(self) -> None:
        """Record that the keys and values are read as dense tensors."""

    def dense_side(self, side: str) -> torch.Tensor:
        """All ``"keys"`` or all ``"values"`` that attention may see, dense ``[B, Hkv, T, D]``."""


class HoldsStates(Protocol):
    """The layer behind :class:`HeldStates`."""

    @property
    def index(self) -> int:
        """Number of the layer in the model."""

    @property
    def version(self) -> int:
        """A number that is incremented whenever the stored tokens change."""

    def decompressed(self, side: str) -> torch.Tensor:
        """All stored ``"keys"`` or ``"values"``, dense ``[B, Hkv, T, D]``."""


class KVHandle(torch.Tensor):
    """A handle on all keys or all values that attention may see, ``[B, Hkv, T, D]``.

    The attention function of this package recognizes a handle and reads the pages of its layer. Any other operation on
    a handle decompresses the cache to a dense tensor. That is slower, and correct with every attention implementation.
    """

    _layer: CachedStates
    _side: str
    _at_version: int
    _source: torch.Tensor | None

    @staticmethod
    def __new__(cls, layer: CachedStates, side: str, sizes: tuple[int, ...], like: torch.Tensor) -> KVHandle:
        """A handle on one side of a layer.

        Args:
            layer: the layer, or the expansion of its latents.
            side: ``"keys"`` or ``"values"``.
            sizes: the shape ``[B, Hkv, T, D]``.
            like: a tensor with the dtype and device of the handle.
        """
        handle = torch.Tensor._make_wrapper_subclass(cls, sizes, dtype=like.dtype, device=like.device)
        handle._layer, handle._side, handle._at_version, handle._source = layer, side, layer.version, None
        return handle

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only((KVHandle, HeldStates), _dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def layer(self) -> CachedStates:
        """The layer behind the handle.

        Raises:
            RuntimeError: if the layer has changed since ``update`` returned the handle.
        """
        if self._at_version != self._layer.version:
            raise RuntimeError(
                "this handle on cached keys or values is out of date: the cache was updated, cropped or reordered "
                "after update() returned it. Use the result of the latest update()."
            )
        return self._layer

    def dense(self) -> torch.Tensor:
        """The keys or values as a dense tensor ``[B, Hkv, T, D]``; zeros stand for padding.

        Raises:
            RuntimeError: if the layer has changed since ``update`` returned the handle, or has evicted tokens.
        """
        if self._source is not None:
            return self._source
        # Contiguous, because composite operations view the result with the strides of the handle.
        layer = self.layer()
        layer.note_dense_read()
        return layer.dense_side(self._side).contiguous()

    @staticmethod
    def of_both(
        layer: CachedStates, keys: torch.Tensor, values: torch.Tensor, length: int
    ) -> tuple[KVHandle, KVHandle]:
        """Handles on ``length`` keys and values of a layer: two objects by one call, since every step makes them.

        Args:
            layer: the layer.
            keys: new keys, ``[B, Hkv, T, Dk]``.
            values: new values, ``[B, Hkv, T, Dv]``.
            length: number of tokens that attention may see.
        """
        batch, heads, _, dim = keys.shape
        version, device, make = layer.version, keys.device, torch.Tensor._make_wrapper_subclass
        first = make(KVHandle, (batch, heads, length, dim), dtype=keys.dtype, device=device)
        second = make(KVHandle, (batch, heads, length, values.shape[3]), dtype=values.dtype, device=device)
        first._layer, first._side, first._at_version, first._source = layer, "keys", version, None
        second._layer, second._side, second._at_version, second._source = layer, "values", version, None
        return first, second

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"KVHandle({self._side}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.dense().clone()


class HeldStates(torch.Tensor):
    """All stored keys or values of a layer, for code that reads them between two updates.

    The shape is known without decompression. Any operation on the tensor decompresses it. The attention function of
    this package treats it like a dense tensor.
    """

    _layer: HoldsStates
    _side: str
    _at_version: int

    @staticmethod
    def __new__(cls, layer: HoldsStates, side: str, sizes: tuple[int, int, int, int], like: torch.Tensor) -> HeldStates:
        """The stored states of one side of a layer.

        Args:
            layer: the layer.
            side: ``"keys"`` or ``"values"``.
            sizes: the shape ``[B, Hkv, T, D]``.
            like: a tensor with the dtype and device of the states.
        """
        states = torch.Tensor._make_wrapper_subclass(cls, sizes, dtype=like.dtype, device=like.device)
        states._layer, states._side, states._at_version = layer, side, layer.version
        return states

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    __torch_dispatch__ = KVHandle.__torch_dispatch__  # type: ignore[assignment]

    def dense(self) -> torch.Tensor:
        """The states as a dense tensor ``[B, Hkv, T, D]``; raises RuntimeError if the layer has changed meanwhile."""
        held = self._layer.decompressed(self._side) if self._at_version == self._layer.version else None
        if held is None or held.shape != self.shape:  # a compiled step changes no version
            raise RuntimeError(
                f"{self._side} of layer {self._layer.index} are out of date: the cache was updated, cropped or "
                f"reordered after they were read. Read cache.layers[{self._layer.index}].{self._side} again, or "
                "clone() them before the change."
            )
        return held.contiguous()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"HeldStates({self._side}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.dense().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)


def _dense(states: KVHandle | HeldStates) -> torch.Tensor:
    return states.dense()


def attach_gradient(handle: KVHandle, source: torch.Tensor, exact: bool) -> KVHandle:
    """A copy of ``handle`` that takes part in autograd.

    Args:
        handle: the handle.
        source: a tensor that requires a gradient. If ``exact``, the handle stands for exactly this tensor; else the
            keys or values of the handle depend on it.
        exact: whether the gradient is known. If not, the backward pass raises RuntimeError.
    """
    return _AttachGradient.apply(source, handle, exact)


class _AttachGradient(torch.autograd.Function):
    """The autograd function of :func:`attach_gradient`."""

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, handle: KVHandle, exact: bool) -> KVHandle:
        ctx.exact = exact
        batch, heads, length, dim = handle.shape
        attached = KVHandle(handle._layer, handle._side, (batch, heads, length, dim), handle)
        if exact:  # autograd keeps handles, and reads them after the layer has changed
            attached._source = source.detach().contiguous()
        return attached

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        if not ctx.exact:
            raise RuntimeError(NO_GRADIENT)
        return (*gradients, None, None)
