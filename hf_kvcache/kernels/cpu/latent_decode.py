"""Absorbed latent attention and its projections by the C++ kernels.

A prepared call makes one call of the library a layer and step; without it there are three.
"""

from __future__ import annotations

from ctypes import byref, pointer
from functools import lru_cache
from typing import Any

import torch

from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.cpu.calls import no_memory, run, set_pages, set_places, set_scoring
from hf_kvcache.kernels.cpu.layouts import DENSE, make_layout, native_layout
from hf_kvcache.kernels.cpu.prepared_call import CpuPreparedCall, all_slots, can_prepare, set_token, visibility_of
from hf_kvcache.kernels.inputs import Attention, CallInputs, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.page import PageLayout, SideFormat
from hf_kvcache.kernels.visibility import Visibility

#: Queries up to which the kernels are used; for more, matrix products are faster.
_MOST_QUERIES = 16
_LARGEST_RANK = 1024


def supports(
    query: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    sums: bool = False,
) -> bool:
    """Whether :func:`latent_attend` can do a call. The reference does all others."""
    rank, rotary = dense.keys.shape[3], dense.values.shape[3]
    mask = visibility.mask
    return (
        not sums
        and 0 < query.shape[2] <= _MOST_QUERIES
        and query.dtype in DENSE
        and query.stride(-1) == 1
        and rank % 16 == 0
        and rank <= _LARGEST_RANK
        and rotary % 8 == 0
        and dense.keys.dtype in DENSE
        and dense.values.dtype == dense.keys.dtype
        and dense.keys.stride(-1) == 1
        and (dense.values.stride(-1) == 1 or rotary == 0)
        and (mask is None or (mask.dtype == torch.bool and mask.stride(-1) == 1))
        and (pages is None or (pages.key_mean is None and native_layout(pages.layout) is not None))
    )


def latent_attend(
    query: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    sums: bool = False,
) -> Attention:
    """As :func:`hf_kvcache.kernels.reference.latent_decode.latent_attend`, for calls that :func:`supports` accepts."""
    batch, heads, length, _ = query.shape
    latents, rotary = dense.keys, dense.values
    rank = latents.shape[3]
    output = torch.empty(batch, length, heads, rank, dtype=query.dtype, device="cpu")
    log_sum_exp = torch.empty(batch, heads, length, dtype=torch.float32, device="cpu")
    call = library.Latent.from_buffer_copy(template(pages, rank, rotary.shape[3]))
    set_query(call, query, output, log_sum_exp)
    set_dense(call, dense)
    _set_visibility(call, visibility)
    _sinks = set_scoring(call, scoring)  # lives until the call has been made
    call.threads = torch.get_num_threads()
    run(library.load().hfkv_latent_attend, byref(call))
    return Attention(output, log_sum_exp)


class PreparedCall(CpuPreparedCall):
    """Prepared absorbed attention of one new token a sequence over latents, with both projections."""

    def __init__(self, inputs: CallInputs) -> None:
        super().__init__(inputs)
        query, slots, up = inputs.query, inputs.slots, inputs.up
        assert up is not None
        batch, heads, _, _ = query.shape
        rank, rotary, dtype = slots.keys.shape[3], slots.values.shape[3], query.dtype
        self._sizes = batch, 1, heads, up.values.shape[1]
        self._query = torch.empty(batch, heads, 1, rank + rotary, dtype=dtype, device="cpu")
        self._latents = torch.empty(batch, 1, heads, rank, dtype=dtype, device="cpu")
        self._log_sum_exp = torch.empty(batch, heads, 1, dtype=torch.float32, device="cpu")
        attend = library.Latent.from_buffer_copy(template(inputs.pages, rank, rotary))
        set_query(attend, self._query, self._latents, self._log_sum_exp)
        set_dense(attend, all_slots(slots, inputs.window))
        _set_visibility(attend, visibility_of(inputs))
        set_scoring(attend, inputs.scoring)
        set_token(attend.token, inputs)
        sizes = batch, heads, 1
        inner, outer = (
            self._latents,
            torch.empty(self._sizes, dtype=dtype, device="cpu"),
        )  # outer: every call brings its own
        self._call = library.LatentCall(
            _projection(False, query, query.stride()[:3], up.keys, self._query, self._query.stride()[:3], sizes),
            attend,
            _projection(True, inner, _by_head(inner), up.values, outer, _by_head(outer), sizes),
        )
        # References to parts of the call, not copies.
        self._absorb, self._attend, self._expand = self._call.absorb, self._call.attend, self._call.expand
        self._token = self._attend.token
        self._run, self._reference = library.load().hfkv_latent_step, byref(self._call)

    @staticmethod
    def supports(inputs: CallInputs) -> bool:
        """Whether a call can be prepared for such tokens."""
        query, up = inputs.query, inputs.up
        assert up is not None
        latents = query.new_empty(1, 1, query.shape[1], inputs.slots.keys.shape[3])  # as attention will give them
        dense = all_slots(inputs.slots, inputs.window)
        return (
            can_prepare(inputs)
            and supports(query, inputs.pages, dense, visibility_of(inputs), inputs.scoring)
            and supports_projection(query[..., : up.keys.shape[1]], up.keys)
            and supports_projection(latents, up.values)
        )

    def _set_dense(self, dense: DenseTokens) -> None:
        set_dense(self._attend, dense)

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slot: int, position: int
    ) -> torch.Tensor:
        attend, token, threads = self._attend, self._token, torch.get_num_threads()
        output = torch.empty(self._sizes, dtype=query.dtype, device="cpu")
        self._absorb.x, self._expand.out = query.data_ptr(), output.data_ptr()
        token.first, token.second = keys.data_ptr(), values.data_ptr()
        attend.slots, attend.start = slot + 1, position
        self._absorb.threads = attend.threads = self._expand.threads = threads
        if self._run(self._reference):
            raise no_memory()
        return output


def _by_head(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides of sequences, heads and queries of ``[B, q, H, D]``."""
    batch, length, heads, _ = x.stride()
    return batch, heads, length


def set_query(call: library.Latent, query: torch.Tensor, output: torch.Tensor, log_sum_exp: torch.Tensor) -> None:
    """Fill in the queries, and where their results go."""
    call.query, call.output, call.log_sum_exp = query.data_ptr(), output.data_ptr(), log_sum_exp.data_ptr()
    call.query_level = DENSE[query.dtype]
    call.query_batch, call.query_head, call.query_token, _ = query.stride()
    call.batch, call.heads, call.length, _ = query.shape


def template(pages: Pages | None, rank: int, rotary: int) -> library.Latent:
    """A call in which the layout and the pages are filled in, to be copied."""
    return _without_pages(rank, rotary) if pages is None else _with_pages(pages)


def _with_pages(pages: Pages) -> library.Latent:
    """A call in which the pages are filled in, made once for each :class:`Pages`."""
    prepared = pages.prepared.get("native latents")
    if prepared is None:
        call = library.Latent(layout=pointer(native_layout(pages.layout)))
        prepared = pages.prepared["native latents"] = (call, set_pages(call, pages))
    return prepared[0]


@lru_cache(maxsize=16)
def _without_pages(rank: int, rotary: int) -> library.Latent:
    latents, turned = (SideFormat(dim, 32, "dense", dense_dtype=torch.float32) for dim in (rank, rotary))
    return library.Latent(layout=pointer(make_layout(PageLayout(latents, turned, 8))))


def set_dense(call: library.Latent, dense: DenseTokens) -> None:
    """Fill in the full-precision tokens."""
    latents, rotary = dense.keys, dense.values
    call.dense_latents, call.dense_rotary = latents.data_ptr(), rotary.data_ptr()
    call.dense_level, call.slots = DENSE[latents.dtype], latents.shape[2]
    call.latents_batch, _, call.latents_token, _ = latents.stride()
    call.rotary_batch, _, call.rotary_token, _ = rotary.stride()
    set_places(call, dense)


def _set_visibility(call: library.Latent, visibility: Visibility) -> None:
    call.start, call.window, call.causal = visibility.start, visibility.window or 0, visibility.causal
    mask = visibility.mask
    if mask is None:
        return
    call.mask, call.mask_start, call.mask_width = mask.data_ptr(), visibility.mask_start, mask.shape[3]
    strides = [stride if size > 1 else 0 for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    call.mask_batch, call.mask_head, call.mask_query = strides[:3]


def supports_projection(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether :func:`absorb` and :func:`expand` can do a projection: few vectors, of the weight's dtype.

    ``x`` is ``[B, H, q, dn]`` or ``[B, q, H, r]``, ``weight`` ``[H, dn or dv, r]``.
    """
    return (
        x.dtype == weight.dtype
        and x.dtype in DENSE
        and x.stride(-1) == 1
        and weight.stride(-1) == 1
        and weight.shape[2] % 16 == 0
        and 0 < x.numel() <= _MOST_QUERIES * weight.shape[0] * x.shape[3]
    )


def absorb(query: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As :func:`hf_kvcache.kernels.reference.latent_decode.absorb`."""
    batch, heads, length, _ = query.shape
    out = torch.empty(batch, heads, length, weight.shape[2], dtype=query.dtype, device="cpu")
    _project(False, query, query.stride()[:3], weight, out, out.stride()[:3], (batch, heads, length))
    return out


def expand(latents: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As :func:`hf_kvcache.kernels.reference.latent_decode.expand`."""
    batch, length, heads, _ = latents.shape
    out = torch.empty(batch, length, heads, weight.shape[1], dtype=latents.dtype, device="cpu")
    _project(True, latents, _by_head(latents), weight, out, _by_head(out), (batch, heads, length))
    return out


def _project(*arguments: Any) -> None:
    call = _projection(*arguments)
    call.threads = torch.get_num_threads()
    run(library.load().hfkv_project, byref(call), "to project its queries")


def _projection(
    transposed: bool,
    x: torch.Tensor,
    x_strides: tuple[int, ...],
    weight: torch.Tensor,
    out: torch.Tensor,
    out_strides: tuple[int, ...],
    sizes: tuple[int, int, int],
) -> library.Project:
    """A call without its number of threads. Strides and sizes are those of sequences, heads and queries."""
    # By position: to fill the struct by name takes as long as all the rest of the call.
    return library.Project(
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        DENSE[x.dtype],
        transposed,
        *sizes,
        *weight.shape[1:],
        *x_strides,
        *out_strides,
        *weight.stride()[:2],
    )
