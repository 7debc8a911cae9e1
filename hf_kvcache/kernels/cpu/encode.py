"""Encoding of pages, and the mean of keys, by the C++ kernels."""

from __future__ import annotations

import itertools
from ctypes import byref, c_float, pointer
from functools import lru_cache

import numpy as np
import torch

from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.cpu.calls import run
from hf_kvcache.kernels.cpu.layouts import DENSE, make_layout, native_layout
from hf_kvcache.kernels.page import PageLayout, SideFormat

__all__ = ["encode_pages", "key_mean", "supports_encoding", "supports_mean"]

#: The methods of encoding that the kernels know, by their names in the codecs' ``method``.
METHODS = {"integer": 0, "unbiased_keys": 1, "unbiased_values": 2, "norm": 3, "dense": 4}
_ONE_THREAD_ELEMENTS = 1 << 16


def supports_encoding(
    layout: PageLayout, methods: tuple[str | None, str | None], keys: torch.Tensor, values: torch.Tensor
) -> bool:
    """Whether :func:`encode_pages` can encode such pages."""
    return (
        keys.dtype == values.dtype
        and keys.dtype in DENSE
        and all(
            method in METHODS and (fmt.level != "dense" or fmt.dense_dtype == keys.dtype)
            for method, fmt in zip(methods, layout.sides.values(), strict=True)
        )
        and native_layout(layout) is not None
    )


def encode_pages(
    layout: PageLayout,
    methods: tuple[str | None, str | None],
    keys: torch.Tensor,
    values: torch.Tensor,
    key_mean: torch.Tensor | None,
    key_scale: torch.Tensor | None,
    records: torch.Tensor,
) -> None:
    """As :func:`hf_kvcache.kernels.triton.encode.encode_pages`, in one call.

    Raises:
        MemoryError: if there is no memory for the work.
    """
    batch, heads, length, _ = keys.shape
    sides = [
        _side(layout, side, method, x) for side, method, x in zip(layout.sides, methods, (keys, values), strict=True)
    ]
    basis = [None if t is None else t.float().contiguous() for t in (key_mean, key_scale)]
    addresses = _addresses(records)
    call = library.Encode(
        layout=pointer(native_layout(layout)),
        keys=sides[0][0],
        values=sides[1][0],
        level=DENSE[keys.dtype],
        heads=heads,
        rows=batch * heads,
        pages=length // layout.page_size,
        key_mean=None if basis[0] is None else basis[0].data_ptr(),
        key_scale=None if basis[1] is None else basis[1].data_ptr(),
        addresses=addresses.ctypes.data,
        threads=torch.get_num_threads(),
    )
    run(library.load().hfkv_encode, byref(call), "for the pages that are packed")


def supports_mean(fmt: SideFormat, keys: torch.Tensor) -> bool:
    """Whether :func:`key_mean` can compute the mean of such keys."""
    return keys.dtype in DENSE and fmt.level != "dense" and _of_keys(fmt) is not None


def key_mean(fmt: SideFormat, keys: torch.Tensor, key_scale: torch.Tensor | None, mean: torch.Tensor) -> None:
    """Write the rotated mean of ``keys [b, heads, n, D]`` over tokens into ``mean [b, heads, D]``.

    Args:
        fmt: the format of the keys.
        keys: in the model's basis.
        key_scale: float32 ``[b, heads, D]``, contiguous, by what they are divided before the rotation; or None.
        mean: float32, contiguous, is written.

    Raises:
        MemoryError: if there is no memory for the work.
    """
    vectors, keys = vectors_of(keys)
    batch, heads, tokens, _ = keys.shape
    layout = _of_keys(fmt)
    assert layout is not None
    call = library.KeyMean(
        layout=pointer(layout),
        keys=vectors,
        level=DENSE[keys.dtype],
        batch=batch,
        heads=heads,
        tokens=tokens,
        key_scale=None if key_scale is None else key_scale.data_ptr(),
        mean=mean.data_ptr(),
        threads=threads_for(keys),
    )
    run(library.load().hfkv_key_mean, byref(call), "for the mean of the keys")


def _side(
    layout: PageLayout, side: str, method: str | None, x: torch.Tensor
) -> tuple[library.EncodeSide, torch.Tensor]:
    """The struct of a side, and the tensor that it refers to."""
    assert method is not None
    vectors, x = vectors_of(x)
    return library.EncodeSide(METHODS[method], _grid(layout.sides[side].table), vectors), x


def vectors_of(x: torch.Tensor) -> tuple[library.Vectors, torch.Tensor]:
    """The struct of ``x [B, H, n, D]``, and the tensor that it refers to: a copy where D is not contiguous."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return library.Vectors(x.data_ptr(), *x.stride()[:3]), x


def _addresses(records: torch.Tensor) -> np.ndarray:
    """Addresses of records, int64 ``[n]``, given as such or as uint8 ``[n, record_bytes]``."""
    if records.dtype == torch.int64:
        return records.contiguous().numpy()
    return records.data_ptr() + np.arange(len(records), dtype=np.int64) * records.stride(0)


@lru_cache(maxsize=16)
def _of_keys(fmt: SideFormat) -> library.Layout | None:
    """A layout whose keys have a format, of which only the rotation counts; None if the kernels know no such format."""
    return make_layout(PageLayout(fmt, fmt, fmt.group if fmt.axis == "channel" else 8))


def threads_for(x: torch.Tensor) -> int:
    """Threads for one pass over a tensor: waking others takes longer than reading a few pages."""
    return 1 if x.numel() < _ONE_THREAD_ELEMENTS else torch.get_num_threads()


@lru_cache(maxsize=16)
def _grid(table: tuple[float, ...]) -> library.Grid:
    edges = [(low + high) / 2 for low, high in itertools.pairwise(table)]
    return library.Grid(len(table), (c_float * 16)(*table), (c_float * 16)(*edges))
