"""Handles on what a layer of DeepSeek V4 holds, and masks over it, that stay as they are on their way to attention.

The model concatenates the rows of the window with the compressed entries, and a mask of the window with one that hides
all entries but those that its indexer has chosen. The tensors here take part in that without being computed: a handle
on both parts comes out, and a mask that still knows the numbers of the chosen entries. Every other operation computes
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from hf_kvcache.integration.handle import KVHandle

_ops = torch.ops.aten


class CompressedHandle(KVHandle):
    """A handle on the rows of a window (side ``"window"``), on compressed entries (``"entries"``), or on both
    (``"all"``)."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kept = _kept(func, args, kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs) if kept is None else kept


def _kept(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The result of an operation on handles that need not be computed for it; None for other operations."""
    if func is _ops.cat.default:
        parts, dim = args[0], args[1] if len(args) > 1 else 0
        if dim not in (2, -2) or len(parts) != 2 or not all(isinstance(part, CompressedHandle) for part in parts):
            return None
        window, entries = parts
        if (window._side, entries._side) != ("window", "entries") or window._layer is not entries._layer:
            return None
        batch, heads, length, dim = window.shape
        return CompressedHandle(window._layer, "all", (batch, heads, length + entries.shape[2], dim), window)
    handle = args[0]
    if not isinstance(handle, CompressedHandle):
        return None
    if func is _ops.unsqueeze.default and handle.dim() == 3 and args[1] == 1:
        batch, length, dim = handle.shape
        return CompressedHandle(handle._layer, handle._side, (batch, 1, length, dim), handle)
    if func in (_ops.new_zeros.default, _ops.new_full.default, _ops.new_empty.default):
        return _new_like(handle, func, args, kwargs)
    return None


def _new_like(handle: CompressedHandle, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """A new tensor with dtype and device of the handle."""
    hidden = func is _ops.new_full.default and args[2] == -torch.inf
    if hidden and handle.dim() == 4 and len(args[1]) == 4 and args[1][3] == handle.shape[2] + 1:
        return ChosenMask(tuple(args[1]), handle.shape[2], handle.dtype, handle.device)
    return func(torch.empty(0, dtype=handle.dtype, device=handle.device), *args[1:], **kwargs)


class _LazyMask(torch.Tensor):
    """An additive mask that is computed only if an operation reads it."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kept = _kept_mask(func, args, kwargs or {})
        if kept is not None:
            return kept
        args, kwargs = tree_map_only(_LazyMask, lambda mask: mask.dense(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def dense(self) -> torch.Tensor:
        """The mask as a plain tensor."""
        raise NotImplementedError

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


class ChosenMask(_LazyMask):
    """A mask ``[B, 1, S, n]`` that shows each query the chosen entries: 0 for these, minus infinity for all others.

    Attributes:
        width: number of entries. ``n`` is one more at first: what is chosen there stands for no entry.
        positions: numbers of the chosen entries, int64 ``[B, 1, S, k]``; None as long as nothing is chosen.
    """

    width: int
    positions: torch.Tensor | None

    @staticmethod
    def __new__(
        cls,
        sizes: tuple[int, ...],
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        positions: torch.Tensor | None = None,
    ) -> ChosenMask:
        mask = torch.Tensor._make_wrapper_subclass(cls, sizes, dtype=dtype, device=device)
        mask.width, mask.positions = width, positions
        return mask

    def dense(self) -> torch.Tensor:
        room = max(self.width + 1, self.shape[3])
        mask = torch.full((*self.shape[:3], room), -torch.inf, dtype=self.dtype, device=self.device)
        if self.positions is not None:
            mask.scatter_(3, self.positions, 0.0)
        return mask[..., : self.shape[3]]


class JointMask(_LazyMask):
    """A mask of a window and of the entries behind it.

    Attributes:
        window: the mask ``[B, 1, S, n]`` of the window.
        chosen: the mask of the entries.
    """

    window: torch.Tensor
    chosen: ChosenMask

    @staticmethod
    def __new__(cls, window: torch.Tensor, chosen: ChosenMask) -> JointMask:
        sizes = (*window.shape[:3], window.shape[3] + chosen.shape[3])
        mask = torch.Tensor._make_wrapper_subclass(cls, sizes, dtype=window.dtype, device=window.device)
        mask.window, mask.chosen = window, chosen
        return mask

    def dense(self) -> torch.Tensor:
        return torch.cat([self.window, self.chosen.dense()], -1)


def _kept_mask(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The result of an operation on masks that need not be computed for it; None for other operations."""
    if func is _ops.cat.default:
        parts, dim = args[0], args[1] if len(args) > 1 else 0
        plain = len(parts) == 2 and dim in (3, -1) and not isinstance(parts[0], _LazyMask)
        if plain and isinstance(parts[1], ChosenMask) and parts[0].dtype == parts[1].dtype:
            alike = parts[0].dim() == 4 and parts[0].shape[:3] == parts[1].shape[:3]
            return JointMask(*parts) if alike and parts[1].shape[3] == parts[1].width else None
        return None
    mask = args[0]
    if not isinstance(mask, ChosenMask):
        return None
    if func is _ops.scatter_.value and mask.positions is None and args[1] in (3, -1) and args[3] == 0:
        mask.positions = args[2]
        return mask
    if func is _ops.slice.Tensor and args[1] in (3, -1) and tuple(args[2:]) in ((0, mask.width), (None, mask.width)):
        return ChosenMask((*mask.shape[:3], mask.width), mask.width, mask.dtype, mask.device, mask.positions)
    if func is _ops.slice.Tensor and tuple(args[2:]) in ((0, 2**63 - 1), (None, None), ()):
        return mask
    if func is _ops._to_copy.default and set(kwargs) == {"dtype"} and kwargs["dtype"].is_floating_point:
        return ChosenMask(tuple(mask.shape), mask.width, kwargs["dtype"], mask.device, mask.positions)
    return None
