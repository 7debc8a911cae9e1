"""What ``update`` returns: a tensor that knows its layer and is materialised only if someone computes with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only

from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.kernels.attention import NO_GRADIENT


class CachedStates(Protocol):
    """What a handle and the attention function ask of the keys and values behind it.

    A layer of a cache answers, and so does the expansion of a layer's latents.
    """

    @property
    def version(self) -> int:
        """Changes whenever handles that were given out earlier become wrong."""

    @property
    def evicts(self) -> bool:
        """Whether tokens that a query may see can be gone."""

    @property
    def takes_expansion(self) -> bool:
        """Whether what is held are latents that the model expands."""

    def has_history(self) -> bool:
        """Whether attention has to look at anything but the tokens of the latest update."""

    def new_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the latest update, dense ``[B, Hkv, T, D]``, with their gradient if they have one."""

    def differentiable(self) -> tuple[torch.Tensor, ...]:
        """The tensors beside the queries that attention over the latest update may be asked for a gradient of."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attention ``[B, T, Hq, Dv]`` of the latest update's queries over all that is held."""

    def note_attended(self, call: AttentionCall) -> None:
        """Take note that someone else computed the attention of the latest update."""

    def note_dense_read(self) -> None:
        """Take note that someone reads dense keys and values."""

    def dense_side(self, side: str) -> torch.Tensor:
        """All ``"keys"`` or ``"values"`` that attention may see, ``[B, Hkv, T, D]``."""


class HoldsStates(Protocol):
    """What :class:`HeldStates` ask of the layer whose keys and values they stand for."""

    @property
    def index(self) -> int:
        """Number of the layer in the model."""

    @property
    def version(self) -> int:
        """Changes whenever what is held changes."""

    def decompressed(self, side: str) -> torch.Tensor:
        """All ``"keys"`` or ``"values"`` that are held, ``[B, Hkv, T, D]``."""


class KVHandle(torch.Tensor):
    """Stands for all keys or all values that a layer shows to attention, ``[B, Hkv, T, D]``.

    The attention of this package recognises it and reads the pages. Any other operation on it decodes the cache into
    a dense tensor, which is correct under every attention implementation and slower.
    """

    _layer: CachedStates
    _side: str
    _at_version: int
    _shown: torch.Tensor | None

    @staticmethod
    def __new__(cls, layer: CachedStates, side: str, sizes: tuple[int, int, int, int], like: torch.Tensor) -> KVHandle:
        """A handle on ``side`` of ``layer`` of ``sizes [B, Hkv, T, D]``, with the dtype and device of ``like``."""
        handle = torch.Tensor._make_wrapper_subclass(cls, sizes, dtype=like.dtype, device=like.device)
        handle._layer, handle._side, handle._at_version, handle._shown = layer, side, layer.version, None
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
            RuntimeError: if the layer was updated or changed since.
        """
        if self._at_version != self._layer.version:
            raise RuntimeError(
                "this handle on cached keys or values is out of date: the cache was updated, cropped or reordered "
                "after update() returned it. Use the result of the latest update()."
            )
        return self._layer

    def dense(self) -> torch.Tensor:
        """The keys or values as a dense tensor, zeros where a token is not held (padding)."""
        if self._shown is not None:
            return self._shown
        # Contiguous, as the handle says it is: composite operations view it by the handle's strides.
        layer = self.layer()
        layer.note_dense_read()
        return layer.dense_side(self._side).contiguous()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"KVHandle({self._side}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.dense().clone()


class HeldStates(torch.Tensor):
    """Stands for all keys or all values that a layer holds, for whoever looks into it between two updates.

    Its shape is known at once; computing with it decompresses them. Attention takes it for any tensor.
    """

    _layer: HoldsStates
    _side: str
    _at_version: int

    @staticmethod
    def __new__(cls, layer: HoldsStates, side: str, sizes: tuple[int, int, int, int], like: torch.Tensor) -> HeldStates:
        """What ``layer`` holds now of ``side``, ``[B, Hkv, T, D]``, with the dtype and device of ``like``."""
        states = torch.Tensor._make_wrapper_subclass(cls, sizes, dtype=like.dtype, device=like.device)
        states._layer, states._side, states._at_version = layer, side, layer.version
        return states

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    __torch_dispatch__ = KVHandle.__torch_dispatch__  # type: ignore[assignment]

    def dense(self) -> torch.Tensor:
        """The states as a dense tensor; raises RuntimeError if the layer was updated or changed since."""
        if self._at_version != self._layer.version:
            raise RuntimeError(
                f"{self._side} of layer {self._layer.index} were looked up before the cache was updated, cropped or "
                "reordered; look them up again, or clone() them in time"
            )
        return self._layer.decompressed(self._side).contiguous()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"HeldStates({self._side}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.dense().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)


def _dense(states: KVHandle | HeldStates) -> torch.Tensor:
    return states.dense()


def carrying_gradient(handle: KVHandle, source: torch.Tensor, exact: bool) -> KVHandle:
    """``handle``, such that what is computed from it has a gradient with respect to ``source``.

    Args:
        handle: fresh from its constructor.
        source: the tensor that it shows, if ``exact``; else any that has a part in it.
        exact: whether the gradient is known; if not, going backwards raises RuntimeError.
    """
    return _Carrying.apply(source, handle, exact)


class _Carrying(torch.autograd.Function):
    """Makes a handle that takes part in autograd."""

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, handle: KVHandle, exact: bool) -> KVHandle:
        ctx.exact = exact
        batch, heads, length, dim = handle.shape
        carrying = KVHandle(handle._layer, handle._side, (batch, heads, length, dim), handle)
        if exact:  # autograd keeps handles, and looks into them when the layer has gone on
            carrying._shown = source.detach().contiguous()
        return carrying

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        if not ctx.exact:
            raise RuntimeError(NO_GRADIENT)
        return (*gradients, None, None)
