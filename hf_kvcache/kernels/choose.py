"""The choice of pages that a decode step reads, by the backend of their device."""

from __future__ import annotations

from typing import Protocol

import torch

from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.inputs import ChoiceInputs
from hf_kvcache.kernels.reference import choose as reference
from hf_kvcache.kernels.reference.choose import NO_COLUMN, best_columns, choose_across_heads, choose_by_mass

__all__ = [
    "NO_COLUMN",
    "PreparedChoice",
    "best_columns",
    "choose",
    "choose_across_heads",
    "choose_by_mass",
    "prepare_choice",
]


class PreparedChoice(Protocol):
    """A choice of pages for one query token of each sequence, prepared once and made for one token after the other.

    The queries have the layout for which it was prepared, and all else is the same; its caller compares them.

    Attributes:
        columns: int64 ``[rows, n]``, what was chosen last, as :func:`choose` returns it.
    """

    columns: torch.Tensor

    def __call__(self, query: torch.Tensor) -> torch.Tensor:
        """Choose pages for ``query [B, Hq, 1, D]``, copy their entries to the table, and return their columns.

        Raises:
            MemoryError: if there is no memory for the scores.
        """


def prepare_choice(inputs: ChoiceInputs) -> PreparedChoice | None:
    """A prepared choice by the backend of the queries' device; None if the backend has none for such inputs."""
    make = getattr(implementation("choose", inputs.query.device), "PreparedChoice", None)
    return make(inputs) if make is not None and make.supports(inputs) else None


def choose(
    query: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    spans: int,
    count: int,
    limits: torch.Tensor | None,
    missing: torch.Tensor | None,
) -> torch.Tensor:
    """As :func:`hf_kvcache.kernels.reference.choose.choose`, which says what the arguments are."""
    faster = implementation("choose", query.device)
    if faster is not None and faster.supports(query, codes):
        return faster.choose(query, codes, scales, spans, count, limits, missing)
    return reference.choose(query, codes, scales, spans, count, limits, missing)
