"""Encoding and decoding of pages by the C++ kernels."""

from __future__ import annotations

import itertools
from ctypes import byref, c_float, pointer
from functools import lru_cache

import numpy as np
import torch

from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.cpu.layouts import native_layout
from hf_kvcache.kernels.page import PageLayout

#: The methods of encoding that the kernels know, by their names in the codecs' ``method``.
METHODS = {"integer": 0, "unbiased_keys": 1, "unbiased_values": 2, "norm": 3}


def supports_decoding(layout: PageLayout, records: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether :func:`decode_side` can decode such records."""
    return (
        native_layout(layout) is not None
        and out.dtype == torch.float32
        and out.is_contiguous()
        and records.stride(-1) == 1
        and (records.dim() == 1 or records.is_contiguous())
    )


def decode_side(layout: PageLayout, side: str, records: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """As :func:`hf_kvcache.kernels.reference.levels.decode_side`."""
    count = records.numel() // layout.record_bytes
    addresses = records.data_ptr() + np.arange(count, dtype=np.int64) * layout.record_bytes
    known = native_layout(layout)
    assert known is not None
    library.load().hfkv_decode_side(
        byref(known),
        side == "values",
        addresses.ctypes.data,
        count,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def supports_encoding(layout: PageLayout, side: str, method: str | None, x: torch.Tensor) -> bool:
    """Whether :func:`encode_side` can encode such pages."""
    return method in METHODS and x.dtype == torch.float32 and native_layout(layout) is not None


def encode_side(
    layout: PageLayout,
    side: str,
    method: str,
    x: torch.Tensor,
    key_mean: torch.Tensor | None,
    key_scale: torch.Tensor | None,
    records: torch.Tensor,
) -> None:
    """Scale and rotate one side of pages, subtract the mean, quantize and pack it.

    Args:
        layout: the layout of the records.
        side: ``"keys"`` or ``"values"``.
        method: one of :data:`METHODS`.
        x: float32 ``[N, P, D]`` in the model's basis.
        key_mean: float32 ``[N, D]``, what to subtract from the rotated vectors of each page; or None.
        key_scale: float32 ``[N, D]``, by what to divide the vectors before the rotation; or None.
        records: uint8 ``[N, record_bytes]``; only the fields of this side are written.

    Raises:
        MemoryError: if there is no memory for the work.
    """
    x = x.contiguous()
    key_mean, key_scale = (None if t is None else t.float().contiguous() for t in (key_mean, key_scale))
    call = library.Encode(
        layout=pointer(native_layout(layout)),
        values=side == "values",
        method=METHODS[method],
        grid=_grid(layout.sides[side].table),
        x=x.data_ptr(),
        key_mean=None if key_mean is None else key_mean.data_ptr(),
        key_scale=None if key_scale is None else key_scale.data_ptr(),
        pages=x.shape[0],
        records=records.data_ptr(),
        threads=torch.get_num_threads(),
    )
    if library.load().hfkv_encode(byref(call)):
        raise MemoryError("packing of a KVCache: no memory left for the pages that are packed")


@lru_cache(maxsize=16)
def _grid(table: tuple[float, ...]) -> library.Grid:
    edges = [(low + high) / 2 for low, high in itertools.pairwise(table)]
    return library.Grid(len(table), (c_float * 16)(*table), (c_float * 16)(*edges))
