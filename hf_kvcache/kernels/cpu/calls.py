"""The arguments that the calls of both attention kernels share: pages, positions of full-precision tokens, scoring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.inputs import DenseTokens, Pages, Scoring

Call = library.Attend | library.Latent


def run(function: Callable[[Any], int], call: Any, purpose: str = "for the partial results") -> None:
    """Make a call, given by reference; raises MemoryError if it finds no memory for its ``purpose``."""
    if function(call):
        raise no_memory(purpose)


def no_memory(purpose: str = "for the partial results") -> MemoryError:
    """The error for a call that did not find the memory it needs."""
    return MemoryError(f"attention over a KVCache: no memory left {purpose}")


def in_floats(query: torch.Tensor) -> torch.Tensor:
    """A query ``[..., D]`` as kernels take it: float32, and the elements of a vector side by side."""
    return query if query.dtype == torch.float32 and query.stride(-1) == 1 else query.float().contiguous()


def set_pages(call: Call, pages: Pages) -> np.ndarray | None:
    """Fill in where the pages lie.

    Returns:
        An array that has to live as long as the call, which holds only its address; None if there is none. The pages
        have to live as long, too.
    """
    addresses, counts, first = pages.addresses, pages.counts, pages.first
    call.addresses, call.counts, call.first = (a.ctypes.data for a in (addresses, counts, first))
    call.row_stride, call.columns = addresses.strides[0] // addresses.itemsize, addresses.shape[1]
    stored = _scattered_positions(pages, call.row_stride)
    call.positions = None if stored is None else stored.ctypes.data
    if isinstance(call, library.Attend):
        mean, scale = pages.key_mean, pages.key_scale
        call.key_mean = None if mean is None else mean.data_ptr()
        call.key_scale = None if scale is None else scale.data_ptr()
    return stored


def _scattered_positions(pages: Pages, row_stride: int) -> np.ndarray | None:
    """Address of the positions of each page that stores positions, 0 for all other pages; None if no page does."""
    if not pages.scattered:
        return None
    stored = np.zeros((pages.rows, row_stride), dtype=np.int64)
    for at, positions in pages.scattered.items():
        stored[at] = positions.ctypes.data
    return stored


def set_places(call: Call, dense: DenseTokens) -> None:
    """Fill in the positions of the full-precision slots, and which of the slots are unused."""
    if dense.positions is not None:
        call.dense_positions, call.positions_batch = dense.positions.data_ptr(), dense.positions.stride(0)
    if dense.unused is not None:
        call.dense_unused, call.unused_batch = dense.unused.data_ptr(), dense.unused.stride(0)


def set_scoring(call: Call, scoring: Scoring) -> torch.Tensor | None:
    """Fill in how scores are made.

    Returns:
        The sink logits, which have to live as long as the call, since the call holds only their address; or None.
    """
    call.inner_scale, call.softcap = scoring.inner, scoring.softcap or 0.0
    if scoring.sink_logits is None:
        return None
    sinks = scoring.sink_logits.float().contiguous()
    call.sink_logits = sinks.data_ptr()
    return sinks
