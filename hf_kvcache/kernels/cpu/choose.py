"""The choice of pages by the C++ kernels, for one query token of each sequence."""

from __future__ import annotations

import math
from ctypes import byref

import torch

from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.cpu.calls import in_floats, no_memory, run
from hf_kvcache.kernels.inputs import ChoiceInputs, MassRule

_PURPOSE = "to choose pages"


def supports(query: torch.Tensor, codes: torch.Tensor) -> bool:
    """Whether :func:`choose` can do a call: one query token, and vectors whose elements lie side by side."""
    return query.shape[1] == 1 and query.is_contiguous() and _side_by_side(codes)


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
    columns = torch.empty(len(query), count, dtype=torch.int64, device="cpu")
    call = _call(codes, scales, spans, limits, missing, columns)
    call.query, call.query_batch = query.data_ptr(), query.stride(0)
    call.heads, call.queries, call.vectors, call.threads = 1, 1, 1, torch.get_num_threads()
    run(library.load().hfkv_choose, byref(call), _PURPOSE)
    return columns


class PreparedChoice:
    """A choice whose C struct stays filled in; each token sets only its queries.

    :class:`hf_kvcache.kernels.choose.PreparedChoice` describes the interface.
    """

    def __init__(self, inputs: ChoiceInputs) -> None:
        query, pages = in_floats(inputs.query), inputs.pages
        self._inputs = inputs  # the struct holds only addresses
        self.columns = torch.empty(inputs.table.shape[1:], dtype=torch.int64, device="cpu")
        call = _call(inputs.codes, inputs.scales, inputs.spans, inputs.limits, inputs.missing, self.columns)
        call.query_batch, call.query_head, _, _ = query.stride()
        call.heads, call.queries = pages.heads, query.shape[1] // pages.heads
        if isinstance(inputs.rule, MassRule):
            call.vectors, call.band = 2, inputs.rule.band
            call.scaling, call.reach = inputs.rule.scaling, inputs.rule.reach
        else:
            call.vectors = len(inputs.rule)
            call.size_weights[: call.vectors] = inputs.rule
        if inputs.sharing is not None:
            sinks = inputs.sharing.sinks
            call.sinks, call.sink_count, call.shared = sinks.data_ptr(), sinks.shape[1], inputs.sharing.count
            call.part_log = math.log(inputs.sharing.tokens)
        call.addresses, call.counts, call.first = (x.ctypes.data for x in (pages.addresses, pages.counts, pages.first))
        call.table_row = pages.counts.strides[0] // pages.counts.itemsize
        call.table, call.table_counts = inputs.table.data_ptr(), inputs.counts.ctypes.data
        self._call, self._run, self._reference = call, library.load().hfkv_choose, byref(call)

    @staticmethod
    def supports(inputs: ChoiceInputs) -> bool:
        """Whether a choice can be prepared for such queries."""
        return _side_by_side(inputs.codes)

    def __call__(self, query: torch.Tensor) -> torch.Tensor:
        call, query = self._call, in_floats(query)
        call.query, call.threads = query.data_ptr(), torch.get_num_threads()
        if self._run(self._reference):
            raise no_memory(_PURPOSE)
        return self.columns


def _side_by_side(codes: torch.Tensor) -> bool:
    return codes.stride(2) == 1 and codes.stride(1) == codes.shape[2]


def _call(
    codes: torch.Tensor,
    scales: torch.Tensor,
    spans: int,
    limits: torch.Tensor | None,
    missing: torch.Tensor | None,
    chosen: torch.Tensor,
) -> library.Choose:
    """A call without its queries."""
    rows, vectors, width = codes.shape
    return library.Choose(
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        limits=None if limits is None else limits.data_ptr(),
        missing=None if missing is None else missing.data_ptr(),
        chosen=chosen.data_ptr(),
        codes_row=codes.stride(0),
        scales_row=scales.stride(0),
        missing_row=0 if missing is None else missing.stride(0),
        rows=rows,
        width=width,
        columns=vectors // spans,
        spans=spans,
        count=chosen.shape[1],
    )
