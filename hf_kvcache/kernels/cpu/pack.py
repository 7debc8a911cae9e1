"""Decoding of pages by the C++ kernels."""

from __future__ import annotations

from ctypes import byref

import numpy as np
import torch

from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.cpu.layouts import native_layout
from hf_kvcache.kernels.page import PageLayout


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
