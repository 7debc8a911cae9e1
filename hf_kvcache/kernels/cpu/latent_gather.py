"""Gathering of single latents by the C++ kernels, which decode only the tokens that are asked for."""

from __future__ import annotations

from ctypes import byref

import torch

from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.cpu.calls import run
from hf_kvcache.kernels.cpu.latent_decode import set_dense, template
from hf_kvcache.kernels.cpu.layouts import DENSE, native_layout
from hf_kvcache.kernels.inputs import DenseTokens, Pages
from hf_kvcache.kernels.workspace import scratch


def supports(pages: Pages | None, dense: DenseTokens) -> bool:
    """Whether :func:`gather_latents` can gather such tokens. The reference does all others."""
    return (
        dense.keys.dtype in DENSE
        and dense.values.dtype == dense.keys.dtype
        and dense.keys.stride(-1) == 1
        and (dense.values.stride(-1) == 1 or dense.values.shape[3] == 0)
        and (pages is None or (pages.key_mean is None and native_layout(pages.layout) is not None))
    )


def gather_latents(pages: Pages | None, dense: DenseTokens, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`hf_kvcache.kernels.reference.latent_gather.gather_latents`, for what :func:`supports` accepts."""
    rank, rotary = dense.keys.shape[3], dense.values.shape[3]
    batch, count = places.shape
    places = places.contiguous()
    call = library.LatentGather()
    call.from_ = library.Latent.from_buffer_copy(template(pages, rank, rotary))
    call.from_.batch, call.from_.threads = batch, torch.get_num_threads()
    set_dense(call.from_, dense)
    # New memory would cost a page fault for every page of it.
    dtype, device = dense.keys.dtype, dense.keys.device
    latents = scratch("picked latents", (batch, 1, count, rank), dtype, device)
    rotary_keys = scratch("picked rotary keys", (batch, 1, count, rotary), dtype, device)
    call.places, call.count = places.data_ptr(), count
    call.latents, call.rotary = latents.data_ptr(), rotary_keys.data_ptr()
    run(library.load().hfkv_gather_latents, byref(call), "to gather latents")
    return latents, rotary_keys
