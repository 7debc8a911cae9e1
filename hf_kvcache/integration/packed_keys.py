"""Keys of an indexer in 8 bits, as the model's indexer reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

#: Tokens that are decoded at a time for the scores: on a CPU few enough that they stay in its cache.
_CPU_TOKENS, _DEVICE_TOKENS = 4096, 65536

_MATMUL = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class PackedKeys(torch.Tensor):
    """The keys ``[B, T, d]`` of an indexer, which are ``codes * scale``.

    An indexer multiplies its queries ``[B, S, H, d]`` with the transposed keys ``[B, 1, d, T]``. This product is
    computed from the codes, some tokens at a time. Any other operation decodes all keys.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    #: What the tensor is of the keys: ``"rows" [B, T, d]``, ``"columns" [B, d, T]`` or ``"factor" [B, 1, d, T]``.
    form: str

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, form: str = "rows") -> PackedKeys:
        """Keys as a tensor.

        Args:
            codes: int8 ``[B, T, d]``.
            scale: float32 ``[B, T]``.
            dtype: of the tensor.
            form: what it is of the keys.
        """
        batch, tokens, dim = codes.shape
        sizes = {"rows": (batch, tokens, dim), "columns": (batch, dim, tokens), "factor": (batch, 1, dim, tokens)}
        keys = torch.Tensor._make_wrapper_subclass(cls, sizes[form], dtype=dtype, device=codes.device)
        keys.codes, keys.scale, keys.form = codes, scale, form
        return keys

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        noted = _NOTED.get(func)
        result = None if noted is None or kwargs else noted(*args)
        if result is not None:
            return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(PackedKeys, PackedKeys.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def dense(self) -> torch.Tensor:
        """The tensor, decoded."""
        rows = (self.codes * self.scale[:, :, None]).to(_dtype_of(self))
        if self.form == "rows":
            return rows
        columns = rows.transpose(1, 2).contiguous()
        return columns if self.form == "columns" else columns[:, None]

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.dense().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedKeys({self.form}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def _dtype_of(x: torch.Tensor) -> torch.dtype:
    with torch._C.DisableTorchFunctionSubclass():
        return x.dtype


def _transposed(keys: Any, first: Any, second: Any) -> PackedKeys | None:
    if type(keys) is not PackedKeys or keys.form != "rows" or {first % 3, second % 3} != {1, 2}:
        return None
    return PackedKeys(keys.codes, keys.scale, _dtype_of(keys), "columns")


def _unsqueezed(keys: Any, dim: Any) -> PackedKeys | None:
    if type(keys) is not PackedKeys or keys.form != "columns" or dim != 1:
        return None
    return PackedKeys(keys.codes, keys.scale, _dtype_of(keys), "factor")


def _float(keys: Any) -> PackedKeys | None:
    return PackedKeys(keys.codes, keys.scale, torch.float32, keys.form) if type(keys) is PackedKeys else None


def _product(query: Any, keys: Any) -> torch.Tensor | None:
    """``query [B, S, H, d]`` times the keys as a factor: ``[B, S, H, T]``."""
    if type(keys) is not PackedKeys or type(query) is not torch.Tensor or keys.form != "factor" or query.dim() != 4:
        return None
    if query.dtype != _dtype_of(keys) or query.shape[0] != len(keys.codes) or query.requires_grad:
        return None
    codes, scale = keys.codes, keys.scale.to(query.dtype)
    batch, length, heads, _ = query.shape
    tokens = codes.shape[1]
    rows = query.reshape(batch, length * heads, -1)
    out = query.new_empty(batch, length * heads, tokens)
    step = _CPU_TOKENS if codes.device.type == "cpu" else _DEVICE_TOKENS
    for start in range(0, tokens, step):
        some = slice(start, start + step)
        torch.matmul(rows, codes[:, some].to(query.dtype).transpose(1, 2), out=(part := out[:, :, some]))
        part *= scale[:, None, some]
    return out.view(batch, length, heads, tokens)


_NOTED: dict[Any, Callable[..., Any]] = {
    torch.Tensor.transpose: _transposed,
    torch.Tensor.unsqueeze: _unsqueezed,
    torch.Tensor.float: _float,
    **dict.fromkeys(_MATMUL, _product),
}
