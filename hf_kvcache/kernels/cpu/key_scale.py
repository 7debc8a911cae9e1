"""The scale of keys by the C++ kernels."""

from __future__ import annotations

from ctypes import byref

import torch

from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.cpu.calls import run
from hf_kvcache.kernels.cpu.encode import threads_for, vectors_of
from hf_kvcache.kernels.cpu.layouts import DENSE
from hf_kvcache.kernels.reference.key_scale import LEAST_TOKENS


def supports(query: torch.Tensor, keys: torch.Tensor, first: int, counted: torch.Tensor | None) -> bool:
    """Whether :func:`key_scale` can do such tokens: of one dtype of up to 32 bits, enough of them, and no padding."""
    return (
        counted is None
        and query.dtype == keys.dtype
        and keys.dtype in DENSE
        and query.shape[0] == keys.shape[0]
        and keys.shape[2] - first >= LEAST_TOKENS
    )


def key_scale(query: torch.Tensor, keys: torch.Tensor, first: int, counted: torch.Tensor | None) -> torch.Tensor:
    """As :func:`hf_kvcache.kernels.reference.key_scale.key_scale`, without padding.

    Raises:
        MemoryError: if there is no memory for the work.
    """
    assert counted is None
    (of_query, query), (of_keys, keys) = vectors_of(query[:, :, first:]), vectors_of(keys[:, :, first:])
    batch, heads, tokens, dim = keys.shape
    scale = torch.empty(batch, heads, dim, dtype=torch.float32, device="cpu")
    call = library.KeyScale(
        query=of_query,
        keys=of_keys,
        level=DENSE[keys.dtype],
        batch=batch,
        query_heads=query.shape[1],
        heads=heads,
        dim=dim,
        tokens=tokens,
        scale=scale.data_ptr(),
        threads=threads_for(query),
    )
    run(library.load().hfkv_key_scale, byref(call), "for the scale of the keys")
    return scale
