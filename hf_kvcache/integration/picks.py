"""The tokens that a model's indexer picks (DeepSeek sparse attention), from the indexer to the attention function.

A model scatters the picked indices into a mask as wide as all tokens, and adds it to its causal mask. Its indexer is
wrapped here to return a tensor that takes note of these operations and computes nothing. So the attention function
gets the indices themselves. Any other operation computes what the model computes.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling
from torch.utils._pytree import tree_map_only

from hf_kvcache.integration.versions import CACHE_NAMES

#: The method with which an indexer adds its keys to a cache, by which indexers are found.
_UPDATE = "update_indexer"
#: The method of an attention class that makes a mask of nothing but the picked tokens (GLM 5).
_BUILD_MASK = "build_attention_mask_from_topk"
#: The attribute of a wrapped function that holds the model's own.
_ORIGINAL = "_hf_kvcache_original"
#: Numbers of queries up to which picked tokens can be read one by one.
MOST_QUERIES = 16

_aten = torch.ops.aten


@dataclass(slots=True)
class Picked:
    """The picked tokens of an attention call.

    Attributes:
        indices: whole numbers ``[B, q, k]``, the columns of the mask that each query may see; -1 for none.
        mask: the mask that the model makes of them, which is computed only if it is used.
        alone: whether the indices say all that a query sees. Otherwise the call has a mask that hides more.
        shown: bool ``[B, q]``, which of the queries' tokens are no padding, if the indexer was told. The layers of a
            model share this tensor.
    """

    indices: torch.Tensor
    mask: PickMask
    alone: bool
    shown: torch.Tensor | None = None


class PickedIndices(torch.Tensor):
    """What an indexer returns, ``[B, q, k]``. The mask that a model makes of it is a :class:`PickMask`."""

    chosen: torch.Tensor
    shown: torch.Tensor | None

    @staticmethod
    def __new__(cls, indices: torch.Tensor, shown: torch.Tensor | None = None) -> PickedIndices:
        """Indices that an indexer has picked, as a tensor of the same shape, dtype and device.

        Args:
            indices: ``[B, q, k]``.
            shown: as of :class:`Picked`.
        """
        picked = torch.Tensor._make_wrapper_subclass(cls, indices.shape, dtype=indices.dtype, device=indices.device)
        picked.chosen, picked.shown = indices, shown
        return picked

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})

    def dense(self) -> torch.Tensor:
        """The indices as a plain tensor."""
        return self.chosen

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.dense().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PickedIndices({self.chosen!r})"


class PickMask(torch.Tensor):
    """A step on the way from picked indices to a mask, which is computed only if it is read."""

    #: What the tensor is: ``"ones"``; ``"hidden"``, True where nothing is picked; ``"shown"``, its opposite;
    #: ``"mask"``, the model's mask.
    role: str
    chosen: torch.Tensor | None
    base: torch.Tensor | None
    shown: torch.Tensor | None
    _compute: Callable[[], torch.Tensor]
    _computed: torch.Tensor | None

    @staticmethod
    def __new__(
        cls,
        role: str,
        compute: Callable[[], torch.Tensor],
        sizes: tuple[int, ...],
        like: torch.Tensor,
        indices: torch.Tensor | None = None,
        base: torch.Tensor | None = None,
    ) -> PickMask:
        """A tensor that ``compute`` gives.

        Args:
            role: what it is.
            compute: computes the tensor.
            sizes: its shape.
            like: a tensor of its dtype and device.
            indices: the picked indices ``[B, q, k]``.
            base: the mask that hides more than the indices do; for the role ``"mask"``.
        """
        mask = torch.Tensor._make_wrapper_subclass(cls, sizes, dtype=like.dtype, device=like.device)
        mask.role, mask.chosen, mask.base, mask._compute, mask._computed = role, indices, base, compute, None
        mask.shown = None
        return mask

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    __torch_dispatch__ = PickedIndices.__torch_dispatch__  # type: ignore[assignment]
    __deepcopy__, __reduce_ex__ = PickedIndices.__deepcopy__, PickedIndices.__reduce_ex__

    def dense(self) -> torch.Tensor:
        """The tensor as the model computes it."""
        if self._computed is None:
            self._computed = self._compute()
        return self._computed

    def picked(self) -> tuple[torch.Tensor | None, Picked | None]:
        """The mask without the picked tokens, and these; None for the latter if every token is picked."""
        assert self.chosen is not None
        if self.base is not None and self.chosen.shape[-1] == self.shape[-1]:
            return self.base, None  # as many as there are: the model picks each of them once
        return self.base, Picked(self.chosen, self, self.base is None, self.shown)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PickMask({self.role}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def _dispatch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation on the tensors above: noted if it is one that makes a mask of indices, else computed."""
    noted = _NOTED.get(func)
    result = noted(func, args, kwargs) if noted is not None else None
    return _compute(func, args, kwargs) if result is None else result


def _compute(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = tree_map_only((PickedIndices, PickMask), lambda x: x.dense(), (args, kwargs))
    return func(*args, **kwargs)


def _later(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], torch.Tensor]:
    return functools.partial(_compute, func, args, kwargs)


def _note_ones(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    indices, sizes = args[0], tuple(args[1])
    if type(indices) is not PickedIndices or kwargs.get("dtype") != torch.bool or kwargs.get("device") is not None:
        return None
    return PickMask("ones", _later(func, args, kwargs), sizes, _boolean(indices))


def _note_cast(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Indices of another width or on another device stay picked indices; a mask that is moved is computed."""
    if type(args[0]) is not PickedIndices:
        return None
    cast = _compute(func, args, kwargs)
    return None if cast.is_floating_point() or cast.dtype == torch.bool else PickedIndices(cast, args[0].shown)


def _note_scatter(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    ones, dim, index, value = args
    given = type(ones) is PickMask and ones.role == "ones" and type(index) is PickedIndices
    if not given or kwargs or dim not in (-1, ones.dim() - 1) or (value is not False and value != 0):
        return None
    return PickMask("hidden", _later(func, args, kwargs), tuple(ones.shape), ones, index.chosen)


def _note_unsqueeze(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    hidden, dim = args
    if type(hidden) is not PickMask or hidden.role not in ("hidden", "shown") or hidden.dim() != 3 or dim != 1:
        return None
    batch, queries, tokens = hidden.shape
    return PickMask(hidden.role, _later(func, args, kwargs), (batch, 1, queries, tokens), hidden, hidden.chosen)


def _note_not(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (mask,) = args
    opposite = {"hidden": "shown", "shown": "hidden"}.get(getattr(mask, "role", ""))
    if opposite is None or kwargs:
        return None
    return PickMask(opposite, _later(func, args, kwargs), tuple(mask.shape), mask, mask.chosen)


def _note_and(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    base, shown = args
    if type(base) is PickMask or type(shown) is not PickMask or shown.role != "shown" or base.dtype != torch.bool:
        return None
    return _combined(func, args, kwargs, base, shown)


def _note_fill(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    base, hidden, value = args
    lowest = base.is_floating_point() and not isinstance(value, torch.Tensor) and value <= torch.finfo(base.dtype).min
    if type(base) is PickMask or type(hidden) is not PickMask or hidden.role != "hidden" or not lowest:
        return None
    return _combined(func, args, kwargs, base, hidden)


def _combined(func: Any, args: Any, kwargs: Any, base: torch.Tensor, picks: PickMask) -> PickMask | None:
    """The model's mask of its causal mask and of the picked tokens; None if the two have other shapes."""
    if base.dim() != 4 or picks.dim() != 4 or base.shape[1] != 1 or base.shape[2:] != picks.shape[2:]:
        return None
    if base.shape[0] not in (1, picks.shape[0]):
        return None
    return PickMask("mask", _later(func, args, kwargs), tuple(picks.shape), base, picks.chosen, base)


def _boolean(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.bool, device=like.device)


#: In inference mode, casts and the operator ``&`` come as operators of their own.
_NOTED: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    _aten.new_ones.default: _note_ones,
    _aten._to_copy.default: _note_cast,
    _aten.to.dtype: _note_cast,
    _aten.scatter.value: _note_scatter,
    _aten.unsqueeze.default: _note_unsqueeze,
    _aten.bitwise_not.default: _note_not,
    _aten.bitwise_and.Tensor: _note_and,
    _aten.__and__.Tensor: _note_and,
    _aten.masked_fill.Scalar: _note_fill,
}


def wrap(file: str, takes_picks: Callable[[Any, int, int], bool]) -> None:
    """Wrap the indexers of an imported module, and its methods that make masks of picked tokens.

    Args:
        file: name of the Python module that defines the model.
        takes_picks: whether the cache of a call, given with the number of the layer and the number of queries, can read
            picked tokens one by one.
    """
    for cls, name, function in _wrapped_methods(file):
        if not hasattr(function, _ORIGINAL):
            make = _wrapped_mask if name == _BUILD_MASK else functools.partial(_wrapped_indexer, takes_picks)
            wrapped = make(function)
            setattr(wrapped, _ORIGINAL, function)
            setattr(cls, name, wrapped)


def unwrap(file: str) -> None:
    """Undo :func:`wrap`."""
    for cls, name, function in _wrapped_methods(file):
        if hasattr(function, _ORIGINAL):
            setattr(cls, name, getattr(function, _ORIGINAL))


def _wrapped_methods(file: str) -> list[tuple[type, str, Any]]:
    """The methods to wrap of an imported module: of indexers, and of attention classes."""
    found = []
    for cls in list(vars(sys.modules.get(file, object)).values()):
        if not isinstance(cls, type):
            continue
        forward, build = vars(cls).get("forward"), vars(cls).get(_BUILD_MASK)
        if forward is not None and _UPDATE in getattr(inspect.unwrap(forward), "__code__", _NO_CODE).co_names:
            found.append((cls, "forward", forward))
        if build is not None:
            found.append((cls, _BUILD_MASK, build))
    return found


class _NO_CODE:
    """The code of a function that has none to look at."""

    co_names: tuple[str, ...] = ()


def _wrapped_indexer(takes_picks: Callable[[Any, int, int], bool], forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def picks(module: Any, *args: Any, **kwargs: Any) -> Any:
        indices = forward(module, *args, **kwargs)
        cache = next((kwargs[name] for name in CACHE_NAMES if name in kwargs), None)
        if cache is None or is_dynamo_compiling() or not _is_plain(indices) or indices.dim() != 3:
            return indices
        if not takes_picks(cache, module.layer_idx, indices.shape[1]):
            return indices
        shown = kwargs.get("attention_mask")
        told = isinstance(shown, torch.Tensor) and shown.dtype == torch.bool and shown.shape == indices.shape[:2]
        return PickedIndices(indices, shown if told else None)

    return picks


def _is_plain(x: Any) -> bool:
    """Whether ``x`` is a tensor and not of a subclass, whose operations may mean something else."""
    return type(x) is torch.Tensor


def _wrapped_mask(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def mask(module: Any, *args: Any, **kwargs: Any) -> Any:
        picked, length = kwargs.get("topk_indices"), kwargs.get("kv_length")
        if type(picked) is not PickedIndices or not isinstance(length, int):
            return build(module, *args, **kwargs)
        compute = functools.partial(build, module, *args, **(kwargs | {"topk_indices": picked.chosen}))
        batch, queries, _ = picked.shape
        # The dtype of an additive mask is that of the queries; nobody asks before the mask is computed.
        noted = PickMask("mask", compute, (batch, 1, queries, length), _boolean(picked), picked.chosen)
        noted.shown = picked.shown
        return noted

    return mask
