"""How many pages a decode step reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

#: More pages than any row has.
_ALL = 1 << 40


@dataclass(frozen=True)
class ReadBudget:
    """The tokens of a KV head that a decode step reads: sinks, tail and the picked pages.

    The tail grows by up to a page before its oldest tokens are packed; that page is not counted.

    Attributes:
        amount: a number of tokens, or a share of the tokens held, above 0 and up to 1.
        sink_length: number of first tokens in full precision, which are always read.
        tail_length: number of newest tokens in full precision, which are always read.
        page_size: number of tokens in a page.
        taper: how much more the first layer may read than the mean of all, and the last one less, as a share of it;
            from 0 and below 1. A layer for which the amount itself covers all tokens reads them, however far behind.

    Raises:
        ValueError: for an amount out of range, or one that has no room for a page beside sinks and tail.
    """

    amount: int | float
    sink_length: int
    tail_length: int
    page_size: int
    taper: float = 0.0

    def __post_init__(self) -> None:
        amount, least = self.amount, self.sink_length + self.tail_length + self.page_size
        share = isinstance(amount, float) and 0 < amount <= 1
        if not share and (isinstance(amount, bool) or not isinstance(amount, int) or amount < least):
            raise ValueError(
                f"read_budget={amount!r}; accepted: a share of the tokens, above 0.0 and up to 1.0, or a whole number "
                f"of tokens from {least}: sinks ({self.sink_length}), tail ({self.tail_length}) and one page "
                f"({self.page_size})"
            )
        if isinstance(self.taper, bool) or not isinstance(self.taper, int | float) or not 0 <= self.taper < 1:
            raise ValueError(f"taper={self.taper!r}; accepted: numbers from 0.0 and below 1.0")

    def pages(self, in_pages: np.ndarray, depth: float = 0.5) -> Any:
        """How many pages each row may read, at least one, int64 ``[rows]``.

        Args:
            in_pages: int64 ``[rows]``, the tokens that the row has in pages.
            depth: of the layer among those that read by this budget: 0 for the first, 1 for the last.
        """
        always = self.sink_length + self.tail_length
        if self.amount == 1.0 and isinstance(self.amount, float):
            return np.full(len(in_pages), _ALL)
        tokens = (
            self.amount * (in_pages + always) if isinstance(self.amount, float) else np.full(len(in_pages), self.amount)
        )
        of_depth = tokens * (1 + self.taper * (1 - 2 * depth))
        pages, tapered = (np.maximum((x - always) // self.page_size, 1).astype(np.int64) for x in (tokens, of_depth))
        return np.where(pages * self.page_size >= in_pages, pages, tapered)
