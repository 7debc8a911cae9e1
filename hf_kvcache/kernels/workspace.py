"""Scratch buffers that kernels reuse, so that decoding allocates nothing whose size grows with the cache."""

from __future__ import annotations

import threading
from math import prod

import torch

_local = threading.local()


def scratch(tag: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialized tensor backed by this thread's buffer for ``tag``; valid until the next call with that tag."""
    buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = _local.__dict__.setdefault("buffers", {})
    size = prod(shape)
    buffer = buffers.get((tag, dtype, device))
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # a tensor made in that mode could not be used outside of it
            buffer = torch.empty(size, dtype=dtype, device=device)
        buffers[tag, dtype, device] = buffer
    return buffer[:size].view(shape)


def scratch_bytes() -> int:
    """The bytes of this thread's scratch buffers, which all caches of the thread share."""
    return sum(b.numel() * b.element_size() for b in _local.__dict__.get("buffers", {}).values())
