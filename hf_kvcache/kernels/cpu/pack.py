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

#: The methods of encoding that the kernels know, by the names that side codecs give.
METHODS = {"integer": 0, "unbiased_keys": 1, "unbiased_values": 2, "norm": 3}


def supports_decoding(layout: PageLayout, records: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether :func:`decode_side` can do it."""
    return (
        native_layout(layout) is not None
        and out.dtype == torch.float32
        and out.is_contiguous()
        and records.stride(-1) == 1
        and (records.dim() == 1 or records.is_contiguous())
    )


def decode_side(layout: PageLayout, side: str, records: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The twin of :func:`hf_kvcache.kernels.reference.levels.decode_side_in_torch`, on the CPU."""
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
    """Whether :func:`encode_side` can do it."""
    return method in METHODS and x.dtype == torch.float32 and native_layout(layout) is not None


def encode_side(
    layout: PageLayout,
    side: str,
    method: str,
    x: torch.Tensor,
    center: torch.Tensor | None,
    records: torch.Tensor,
) -> None:
    """Rotate, centre, quantize and pack one side of pages.

    Args:
        layout: the layout of the records.
        side: ``"keys"`` or ``"values"``.
        method: one of :data:`METHODS`.
        x: float32 ``[N, P, D]`` in the model's basis.
        center: float32 ``[N, D]``, what to subtract from each page's rotated vectors, or None.
        records: uint8 ``[N, record_bytes]``; only the fields of this side are written.

    Raises:
        MemoryError: if there is no memory for the work.
    """
    x = x.contiguous()
    center = None if center is None else center.float().contiguous()
    call = library.Encode(
        layout=pointer(native_layout(layout)),
        values=side == "values",
        method=METHODS[method],
        grid=_grid(layout.sides[side].table),
        x=x.data_ptr(),
        center=None if center is None else center.data_ptr(),
        pages=x.shape[0],
        records=records.data_ptr(),
        threads=torch.get_num_threads(),
    )
    if library.load().hfkv_encode(byref(call)):
        raise MemoryError("packing of a KVCache: no memory left for the pages in work")


@lru_cache(maxsize=16)
def _grid(table: tuple[float, ...]) -> library.Grid:
    edges = [(low + high) / 2 for low, high in itertools.pairwise(table)]
    return library.Grid(len(table), (c_float * 16)(*table), (c_float * 16)(*edges))
