"""The state of a layer with a fixed maximum length, as kernels on its device read and change it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.kernels.page import PageLayout

#: Numbers at the start of ``state``: tokens seen, page events.
HEADER = 2
#: Counters of each sequence behind them: slots of the dense buffer in use, pages, whether the key mean is fixed,
#: positions of the first and of the last token that is no padding (-1 before there is one), whether padding stands
#: between them.
LENGTH, PAGES, MEAN_KNOWN, FIRST, LAST, GAPS = range(6)
COUNTERS = 6


@dataclass(frozen=True)
class StaticState:
    """The tensors of a layer of ``B`` sequences and ``H`` KV heads, with room for ``R`` pages a row and ``C`` slots.

    Attributes:
        layout: the layout of the records.
        methods: names of the encodings of keys and of values; None where a codec has none.
        records: uint8 ``[B * H * R, record_bytes]``.
        key_mean: float32 ``[B, H, dim]``; None if the codec subtracts no mean.
        key_scale: float32 ``[B, H, dim]``, by what keys are divided before the rotation; None if they are not.
        dense_keys: ``[B, H, C, Dk]``: sinks, then the tail.
        dense_values: ``[B, H, C, Dv]``.
        page_positions: int32 ``[B, R, P]``, the position of each packed token.
        state: int64: :data:`HEADER` numbers, ``[6, B]`` counters, ``[B, C]`` positions of the tokens in slots,
            ``[B * H, R]`` places of the pages among the records, ``[B * H, R]`` positions of their first tokens.
        sink_length: tokens at the start of a sequence that stay in full precision.
        max_length: tokens that a sequence can have.
        window: tokens that a query sees, its own included; None for all.
    """

    layout: PageLayout
    methods: tuple[str | None, str | None]
    records: torch.Tensor
    key_mean: torch.Tensor | None
    key_scale: torch.Tensor | None
    dense_keys: torch.Tensor
    dense_values: torch.Tensor
    page_positions: torch.Tensor
    state: torch.Tensor
    sink_length: int
    max_length: int
    window: int | None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Sequences, KV heads, dense slots and pages a row."""
        batch, heads, slots, _ = self.dense_keys.shape
        return batch, heads, slots, self.page_positions.shape[1]

    @property
    def positions(self) -> torch.Tensor:
        """Positions of the tokens in slots, int64 ``[B, C]``, a view."""
        batch, _, slots, _ = self.sizes
        start = HEADER + COUNTERS * batch
        return self.state[start : start + batch * slots].view(batch, slots)

    @property
    def places(self) -> torch.Tensor:
        """The record of each page, int64 ``[B * H, R]``, a view."""
        return self._table(0)

    @property
    def first(self) -> torch.Tensor:
        """The position of each page's first token, int64 ``[B * H, R]``, a view."""
        return self._table(1)

    def _table(self, number: int) -> torch.Tensor:
        batch, heads, slots, pages = self.sizes
        size = batch * heads * pages
        start = HEADER + batch * (COUNTERS + slots) + number * size
        return self.state[start : start + size].view(batch * heads, pages)


@dataclass(frozen=True)
class NewToken:
    """One new token of each sequence, and how attention to it and to all tokens before it is computed.

    Attributes:
        query: ``[B, Hq, 1, Dk]``.
        keys: ``[B, H, 1, Dk]``.
        values: ``[B, H, 1, Dv]``.
        mask: what the query sees of ``L >= max_length`` positions, boolean or additive ``[B, L]`` with a contiguous
            last dimension; a token that its own query does not see is padding. None if no token is padding.
        scoring: how scores are made.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None
    scoring: Scoring
