"""The choice of pages for one query token of each sequence by two Triton launches, prepared once for many tokens."""

from __future__ import annotations

import torch
import triton

from hf_kvcache.kernels.inputs import ChoiceInputs, MassRule
from hf_kvcache.kernels.triton.choose_kernels import (
    MOST_COLUMNS,
    SCORE_WARPS,
    compile_cases,
    mass_kernel,
    pick_constants,
    pick_kernel,
    score_constants,
    score_kernel,
)
from hf_kvcache.kernels.triton.device import on_their_device
from hf_kvcache.kernels.triton.prepared_launch import PreparedLaunch, current_stream
from hf_kvcache.kernels.triton.sides import TRITON_TYPES

__all__ = ["PreparedChoice", "compile_cases", "supports"]


def supports(query: torch.Tensor, codes: torch.Tensor) -> bool:
    """Whether there is a function for choices that are not prepared: there is none, the reference makes them."""
    return False


class PreparedChoice:
    """The prepared choice of the Triton kernels; :class:`hf_kvcache.kernels.choose.PreparedChoice` describes it.

    Nothing is read back, and nothing is sent to the device. **It was never run on a GPU.**
    """

    def __init__(self, inputs: ChoiceInputs) -> None:
        self._inputs = inputs
        self._device = inputs.query.device
        with torch.inference_mode(False):
            self.columns = torch.empty(inputs.table.shape[1:], dtype=torch.int64, device=self._device)
            self._by_mass = isinstance(inputs.rule, MassRule)
            self._group = inputs.query.shape[1] // inputs.pages.heads
            # By page, or by query head and part of a page.
            own = inputs.pages.columns * (self._group * inputs.spans if self._by_mass else 1)
            self._scores = torch.empty(inputs.pages.rows, own, dtype=torch.float32, device=self._device)
        self._score, self._pick = self._prepare_score(), self._prepare_pick()

    @staticmethod
    def supports(inputs: ChoiceInputs) -> bool:
        """Whether a choice can be prepared for such queries and so many pages."""
        query, codes = inputs.query, inputs.codes
        return (
            query.dtype in TRITON_TYPES
            and query.stride(3) == 1
            and query.shape[3] <= 256
            and codes.stride(2) == 1
            and codes.stride(1) == codes.shape[2]
            and inputs.pages.columns <= MOST_COLUMNS
        )

    def __call__(self, query: torch.Tensor) -> torch.Tensor:
        self._launch(query)
        if self._device.type == "cpu":  # the interpreter
            torch.from_numpy(self._inputs.counts).copy_(self._inputs.table[1])
        return self.columns

    @on_their_device
    def _launch(self, query: torch.Tensor) -> None:
        stream = current_stream(self._device)
        self._score(stream, (query,))
        self._pick(stream, ())

    def _prepare_score(self) -> PreparedLaunch:
        inputs, pages, missing = self._inputs, self._inputs.pages, self._inputs.missing
        constants = score_constants(inputs.query.shape[3], self._group, inputs.spans, inputs.rule, missing is not None)
        arguments = {
            "codes": inputs.codes,
            "scales": inputs.scales,
            "missing": self._scores if missing is None else missing.view(torch.uint8),
            "scores": self._scores,
            "query_b": inputs.query.stride(0),
            "query_h": inputs.query.stride(1),
            "codes_row": inputs.codes.stride(0),
            "scales_row": inputs.scales.stride(0),
            "missing_row": 0 if missing is None else missing.stride(0),
            "heads": pages.heads,
            "columns": pages.columns,
            **constants,
        }
        scored = pages.columns * (inputs.spans if self._by_mass else 1)
        grid = triton.cdiv(scored, constants["BLOCK"]), pages.rows
        kernel = mass_kernel if self._by_mass else score_kernel
        return PreparedLaunch(kernel, grid, arguments, {"num_warps": SCORE_WARPS})

    def _prepare_pick(self) -> PreparedLaunch:
        inputs, pages = self._inputs, self._inputs.pages
        held, count = pages.on_device(), inputs.table.shape[2]
        parts = (self._group, inputs.spans) if self._by_mass else ()
        constants, warps = pick_constants(pages.columns, count, inputs.limits is not None, *parts)
        arguments = {
            "scores": self._scores,
            "limits": self.columns if inputs.limits is None else inputs.limits,
            "pages": held.table,
            "chosen": self.columns,
            "table": inputs.table,
            "rows": pages.rows,
            "capacity": held.capacity,
            "columns": pages.columns,
            "count": count,
            **constants,
        }
        return PreparedLaunch(pick_kernel, (pages.rows, 1), arguments, {"num_warps": warps})
