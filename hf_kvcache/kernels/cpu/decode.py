"""Attention of few queries over pages and full-precision tokens by the C++ kernels, in one call."""

from __future__ import annotations

from ctypes import byref, pointer
from functools import lru_cache

import torch

from hf_kvcache.kernels.attention import MOST_DECODED_QUERIES
from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.cpu.calls import in_floats, no_memory, run, set_pages, set_places, set_scoring
from hf_kvcache.kernels.cpu.layouts import DENSE, make_layout, native_layout
from hf_kvcache.kernels.cpu.prepared_call import CpuPreparedCall, all_slots, can_prepare, set_token, visibility_of
from hf_kvcache.kernels.inputs import Attention, CallInputs, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.page import PageLayout, SideFormat
from hf_kvcache.kernels.visibility import Visibility


def supports(query: torch.Tensor, pages: Pages | None, dense: DenseTokens, visibility: Visibility) -> bool:
    """Whether the kernels can do a call: no mask that says more than causality, windows and padding."""
    return (
        visibility.mask is None
        and dense.keys.dtype in DENSE
        and dense.values.dtype == dense.keys.dtype
        and dense.keys.stride(-1) == 1
        and dense.values.stride(-1) == 1
        and (pages is None or native_layout(pages.layout) is not None)
    )


def attend(
    query: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    sums: bool = False,
) -> Attention:
    """As :func:`hf_kvcache.kernels.reference.decode.attend`."""
    batch, query_heads, length, _ = query.shape
    floats = in_floats(query)
    keys, values = dense.keys, dense.values
    output = torch.empty(batch, length, query_heads, values.shape[3], dtype=torch.float32, device="cpu")
    log_sum_exp = torch.empty(batch, query_heads, length, dtype=torch.float32, device="cpu")
    call = library.Attend.from_buffer_copy(_template(pages, keys.shape[3], values.shape[3]))
    call.query, call.output, call.log_sum_exp = floats.data_ptr(), output.data_ptr(), log_sum_exp.data_ptr()
    call.query_batch, call.query_head, call.query_token, _ = floats.stride()
    call.batch, call.query_heads, call.heads, call.length = batch, query_heads, keys.shape[1], length
    _set_dense(call, dense)
    call.start, call.window, call.causal = visibility.start, visibility.window or 0, visibility.causal
    _sinks = set_scoring(call, scoring)  # lives until the call has been made
    page_sums = dense_sums = None
    if sums:
        dense_sums = torch.empty(batch, query_heads, keys.shape[2], dtype=torch.float32, device="cpu")
        call.dense_sums = dense_sums.data_ptr()
        if pages is not None:
            page_sums = torch.empty(
                batch, query_heads, pages.columns * pages.layout.page_size, dtype=torch.float32, device="cpu"
            )
            call.page_sums = page_sums.data_ptr()
    call.threads = torch.get_num_threads()
    run(library.load().hfkv_attend, byref(call))
    return Attention(output.to(query.dtype), log_sum_exp, page_sums, dense_sums)


class PreparedCall(CpuPreparedCall):
    """Prepared attention of a few new tokens a sequence over keys and values."""

    most_tokens = MOST_DECODED_QUERIES

    def __init__(self, inputs: CallInputs) -> None:
        super().__init__(inputs)
        slots, (batch, query_heads, length, _) = inputs.slots, inputs.query.shape
        key_dim, value_dim = slots.keys.shape[3], slots.values.shape[3]
        self._sizes = batch, length, query_heads, value_dim
        self._log_sum_exp = torch.empty(batch, query_heads, length, dtype=torch.float32, device="cpu")
        call = self._attend = library.Attend.from_buffer_copy(_template(inputs.pages, key_dim, value_dim))
        call.log_sum_exp = self._log_sum_exp.data_ptr()
        call.batch, call.query_heads, call.heads, call.length = batch, query_heads, slots.keys.shape[1], length
        call.query_batch, call.query_head, call.query_token, _ = in_floats(inputs.query).stride()
        self._set_dense(all_slots(slots, inputs.window))
        call.window, call.causal = inputs.window or 0, 1
        set_scoring(call, inputs.scoring)
        self._token, self._length = call.token, length
        set_token(self._token, inputs)
        self._run, self._reference = library.load().hfkv_attend, byref(call)

    @staticmethod
    def supports(inputs: CallInputs) -> bool:
        """Whether a call can be prepared for such tokens."""
        dense = all_slots(inputs.slots, inputs.window)
        return can_prepare(inputs) and supports(inputs.query, inputs.pages, dense, visibility_of(inputs))

    def _set_dense(self, dense: DenseTokens) -> None:
        _set_dense(self._attend, dense)

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slot: int, position: int
    ) -> torch.Tensor:
        call, token, plain = self._attend, self._token, query.dtype == torch.float32
        floats = query if plain and query.stride(-1) == 1 else query.float().contiguous()
        output = torch.empty(self._sizes, dtype=torch.float32, device="cpu")
        call.query, call.output = floats.data_ptr(), output.data_ptr()
        token.first, token.second = keys.data_ptr(), values.data_ptr()
        call.slots, call.start, call.threads = slot + self._length, position, torch.get_num_threads()
        if self._run(self._reference):
            raise no_memory()
        return output if plain else output.to(query.dtype)


def _template(pages: Pages | None, key_dim: int, value_dim: int) -> library.Attend:
    return _without_pages(key_dim, value_dim) if pages is None else _with_pages(pages)


def _with_pages(pages: Pages) -> library.Attend:
    """A call in which the pages are filled in, made once for each :class:`Pages`."""
    prepared = pages.prepared.get("native")
    if prepared is None:
        call = library.Attend(layout=pointer(native_layout(pages.layout)))
        prepared = pages.prepared["native"] = (call, set_pages(call, pages))
    return prepared[0]


@lru_cache(maxsize=16)
def _without_pages(key_dim: int, value_dim: int) -> library.Attend:
    keys, values = (SideFormat(dim, 32, "dense", dense_dtype=torch.float32) for dim in (key_dim, value_dim))
    return library.Attend(layout=pointer(make_layout(PageLayout(keys, values, 8))))


def _set_dense(call: library.Attend, dense: DenseTokens) -> None:
    keys, values = dense.keys, dense.values
    call.dense_keys, call.dense_values = keys.data_ptr(), values.data_ptr()
    call.dense_level, call.slots = DENSE[keys.dtype], keys.shape[2]
    call.keys_batch, call.keys_head, call.keys_token, _ = keys.stride()
    call.values_batch, call.values_head, call.values_token, _ = values.stride()
    set_places(call, dense)
