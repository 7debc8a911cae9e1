"""Scratch buffers that kernels reuse, so that decoding allocates nothing whose size grows with the cache.

A buffer is for one thread, and on a GPU for one stream: what is launched on other streams runs at the same time.
"""

from __future__ import annotations

import threading
from math import prod

import torch

_local = threading.local()


def scratch(tag: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialized tensor backed by the buffer for ``tag`` of this thread and of the current stream.

    It is valid until the next call with that tag on the same thread and stream.
    """
    buffers: dict[tuple[str, torch.dtype, torch.device, int], torch.Tensor] = _local.__dict__.setdefault("buffers", {})
    size = prod(shape)
    key = tag, dtype, device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # a tensor made in that mode could not be used outside of it
            buffer = torch.empty(size, dtype=dtype, device=device)
        buffers[key] = buffer
    return buffer[:size].view(shape)


def scratch_bytes() -> int:
    """The bytes of this thread's scratch buffers, which all caches of the thread share."""
    return sum(b.numel() * b.element_size() for b in _local.__dict__.get("buffers", {}).values())
