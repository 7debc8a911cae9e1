"""The choice of pages by the C++ kernels, for one query token of each sequence."""

from __future__ import annotations

from ctypes import byref

import torch

from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.cpu.calls import run


def supports(query: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, length: int) -> bool:
    """Whether :func:`choose` can do a call: one query token, and vectors whose elements lie side by side."""
    return length == 1 and query.is_contiguous() and codes.stride(2) == 1 and codes.stride(1) == codes.shape[2]


def choose(
    query: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    spans: int,
    count: int,
    limits: torch.Tensor | None,
    missing: torch.Tensor | None,
) -> torch.Tensor:
    """As :func:`hf_kvcache.kernels.reference.choose.choose`, for calls that :func:`supports` accepts.

    Where pages have equal scores, those that come first are chosen.
    """
    rows, queries, width = query.shape
    columns = torch.empty(rows, count, dtype=torch.int64, device="cpu")
    call = library.Choose(
        query=query.data_ptr(),
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        limits=None if limits is None else limits.data_ptr(),
        missing=None if missing is None else missing.data_ptr(),
        chosen=columns.data_ptr(),
        codes_row=codes.stride(0),
        scales_row=scales.stride(0),
        missing_row=0 if missing is None else missing.stride(0),
        rows=rows,
        queries=queries,
        width=width,
        columns=codes.shape[1] // spans,
        spans=spans,
        count=count,
        threads=torch.get_num_threads(),
    )
    run(library.load().hfkv_choose, byref(call), "to choose pages")
    return columns
