"""The choice of pages for one query token of each sequence by two or three Triton launches, prepared once for many."""

from __future__ import annotations

from typing import Any

import torch
import triton

from hf_kvcache.kernels.inputs import ChoiceInputs, MassRule, Sharing
from hf_kvcache.kernels.triton import choose_kernels, choose_shared_kernels
from hf_kvcache.kernels.triton.choose_kernels import (
    MOST_COLUMNS,
    SCORE_WARPS,
    mass_kernel,
    pick_constants,
    pick_kernel,
    pick_warps,
    score_constants,
    score_kernel,
)
from hf_kvcache.kernels.triton.choose_shared_kernels import (
    candidate_constants,
    candidate_kernel,
    fits,
    pick_shared_kernel,
    shared_constants,
)
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.device import on_their_device
from hf_kvcache.kernels.triton.prepared_launch import PreparedLaunch, current_stream
from hf_kvcache.kernels.triton.sides import TRITON_TYPES

__all__ = ["PreparedChoice", "compile_cases", "supports"]


def compile_cases(architecture: str) -> list[CompileCase]:
    """Choices of each row by itself, and of the heads of a sequence together."""
    return [*choose_kernels.compile_cases(architecture), *choose_shared_kernels.compile_cases(architecture)]


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
            of_pages = inputs.pages.rows, inputs.pages.columns if inputs.sharing is not None else 0
            self._candidates = torch.empty(of_pages, dtype=torch.float32, device=self._device)
        self._score, self._narrow = self._prepare_score(), None
        if inputs.sharing is None:
            self._pick = self._prepare_pick()
        else:
            self._narrow, self._pick = self._prepare_candidates(inputs.sharing), self._prepare_shared(inputs.sharing)

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
            and (inputs.sharing is None or fits(inputs.pages.heads, inputs.pages.columns))
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
        if self._narrow is not None:
            self._narrow(stream, (query,))
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
        inputs, columns = self._inputs, self._inputs.pages.columns
        count = inputs.table.shape[2]
        parts = (self._group, inputs.spans) if self._by_mass else ()
        constants, warps = pick_constants(columns, count, inputs.limits is not None, *parts)
        arguments = {"scores": self._scores, "count": count, **self._written(), **constants}
        return PreparedLaunch(pick_kernel, (inputs.pages.rows, 1), arguments, {"num_warps": warps})

    def _prepare_candidates(self, sharing: Sharing) -> PreparedLaunch:
        inputs, columns = self._inputs, self._inputs.pages.columns
        assert isinstance(inputs.rule, MassRule)
        sizes = inputs.query.shape[3], self._group, inputs.spans
        known = sharing.sinks.shape[1], sharing.tokens
        arguments = {
            "scores": self._scores,
            "sinks": sharing.sinks,
            "limits": self._limits(),
            "candidates": self._candidates,
            "query_b": inputs.query.stride(0),
            "query_h": inputs.query.stride(1),
            "heads": inputs.pages.heads,
            "columns": columns,
            "count": sharing.count,
            **candidate_constants(*sizes, inputs.rule, *known, columns, inputs.limits is not None),
        }
        return PreparedLaunch(candidate_kernel, (inputs.pages.rows, 1), arguments, {"num_warps": pick_warps(columns)})

    def _prepare_shared(self, sharing: Sharing) -> PreparedLaunch:
        inputs, pages = self._inputs, self._inputs.pages
        width = inputs.table.shape[2]
        constants, warps = shared_constants(pages.heads, pages.columns, width, inputs.limits is not None)
        arguments = {
            "candidates": self._candidates,
            "heads": pages.heads,
            "count": sharing.count,
            "width": width,
            **self._written(),
            **constants,
        }
        return PreparedLaunch(pick_shared_kernel, (pages.rows, 1), arguments, {"num_warps": warps})

    def _limits(self) -> torch.Tensor:
        """How many pages each row may have; where it is one number for all, a tensor that no kernel reads."""
        return self.columns if self._inputs.limits is None else self._inputs.limits

    def _written(self) -> dict[str, Any]:
        """Arguments of the kernels that write the chosen columns and the table's entries of their pages."""
        pages = self._inputs.pages
        held = pages.on_device()
        return {
            "limits": self._limits(),
            "pages": held.table,
            "chosen": self.columns,
            "table": self._inputs.table,
            "rows": pages.rows,
            "capacity": held.capacity,
            "columns": pages.columns,
        }
