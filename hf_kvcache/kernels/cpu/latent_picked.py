"""Attention to picked latents by the C++ kernels, which decode a few tokens at a time and attend to them at once."""

from __future__ import annotations

from ctypes import byref

import torch

from hf_kvcache.kernels.cpu import latent_decode, library
from hf_kvcache.kernels.cpu.calls import run, set_scoring
from hf_kvcache.kernels.cpu.latent_decode import set_dense, set_query, template
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.visibility import EVERYTHING


def supports(query: torch.Tensor, pages: Pages | None, dense: DenseTokens, scoring: Scoring) -> bool:
    """Whether :func:`attend_picked` can do a call. Others are done in two steps, of which torch does the first."""
    return latent_decode.supports(query, pages, dense, EVERYTHING, scoring)


def attend_picked(
    query: torch.Tensor, places: torch.Tensor, pages: Pages | None, dense: DenseTokens, scoring: Scoring
) -> Attention:
    """As :func:`hf_kvcache.kernels.latent_picked.attend_picked`, for calls that :func:`supports` accepts."""
    batch, heads, length, width = query.shape
    rank = dense.keys.shape[3]
    if length > 1:  # every query is a sequence of its own
        query = query.transpose(1, 2).reshape(batch * length, heads, 1, width)
    places = places.contiguous()
    output = torch.empty(batch * length, 1, heads, rank, dtype=query.dtype, device="cpu")
    log_sum_exp = torch.empty(batch * length, heads, 1, dtype=torch.float32, device="cpu")
    call = library.LatentPicked()
    call.attend = library.Latent.from_buffer_copy(template(pages, rank, dense.values.shape[3]))
    set_query(call.attend, query, output, log_sum_exp)
    set_dense(call.attend, dense)
    _sinks = set_scoring(call.attend, scoring)  # lives until the call has been made
    call.attend.threads = torch.get_num_threads()
    call.places, call.count, call.queries = places.data_ptr(), places.shape[2], length
    run(library.load().hfkv_attend_picked, byref(call))
    return Attention(output.view(batch, length, heads, rank), log_sum_exp.view(batch, length, heads).transpose(1, 2))
