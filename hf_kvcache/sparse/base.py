"""What a selector is: it scores the pages of each KV head for the queries of a decode step."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any, ClassVar

import torch


@dataclass
class Question:
    """What a selector without vectors sees of a step. A row is a KV head of a sequence.

    Attributes:
        rows: number of rows.
        columns: pages of the longest row.
        length: number of query tokens.
        position: position of the first of them.
        layer_index: number of the layer in the model.
        device: where the pages are.
    """

    rows: int
    columns: int
    length: int
    position: int
    layer_index: int
    device: torch.device


class Selector:
    """Scores pages. A new selector is one file in ``selectors/`` with a subclass that carries ``@register``.

    A selector of ``vectors`` overrides :meth:`summarize`, and :attr:`size_weights`, :meth:`ask` or :attr:`reach`. One
    that needs nothing of the pages overrides :meth:`score`. One with ``exact`` is given the attention probabilities
    themselves, and overrides neither.
    """

    #: Registered name.
    name: ClassVar[str]
    #: Vectors that are kept of each part of a page.
    vectors: ClassVar[int] = 0
    #: How these are rounded to 8 bits: 1 up, -1 down, 0 to the nearest.
    rounding: ClassVar[tuple[int, ...]] = ()
    #: Whether pages are scored by their attention probabilities, for which a layer reads all of them.
    exact: ClassVar[bool] = False
    #: Whether some layers choose for those behind them.
    shared: ClassVar[bool] = False
    #: Tokens that are summarized together; None for a page in so many :attr:`parts`.
    span: int | None = None
    #: How much more than the mean the first layer reads, and the last one less, unless a cache is told.
    taper: ClassVar[float] = 0.0
    #: Parts of a page without :attr:`span`.
    parts: ClassVar[int] = 1
    #: Of a selector whose two vectors are mean and standard deviation, and that scores pages by the attention expected
    #: from these: see :class:`hf_kvcache.kernels.inputs.MassRule`. None for any other.
    reach: float | None = None
    #: Of such a selector, how many neighboring elements have one deviation together; fewer where the width of a head
    #: is no multiple of it.
    band: int = 1
    #: Of such a selector, whether the KV heads of a layer share the pages that they may read.
    across: bool = False

    def __repr__(self) -> str:
        return self.name

    @property
    def size_weights(self) -> tuple[float, ...] | None:
        """How :meth:`ask` makes each of the one or two vectors, so that kernels can do the same.

        A vector is the sum of the queries over the query heads, plus this weight times the sum of their absolute
        values. None if a selector makes them in another way.
        """
        return None

    def band_of(self, dim: int) -> int:
        """How many elements of a head of such a width have one deviation together."""
        return gcd(self.band, dim)

    def width(self, dim: int) -> int:
        """Numbers that are kept of each part of a page, for heads of such a width."""
        return self.vectors * dim if self.reach is None else dim + dim // self.band_of(dim)

    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor by name, read from the attributes of these names."""
        if type(self).__init__ is object.__init__:
            return {}
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def leaders(self, sparse: Sequence[int]) -> dict[int, int]:
        """For each of the layers ``sparse`` that do not read everything, the layer whose choice it reads.

        Only a selector that is ``shared`` has such layers.
        """
        raise NotImplementedError

    def summarize(self, keys: torch.Tensor, unused: torch.Tensor | None) -> torch.Tensor:
        """What to keep of parts of pages.

        Args:
            keys: float32 ``[N, n, D]``, as attention sees them.
            unused: bool ``[N, n]``, True where there is no token; None if there is one everywhere.

        Returns:
            Float32 ``[N, vectors, D]``; finite, whatever stands in parts without any token.
        """
        raise NotImplementedError

    def ask(self, query: torch.Tensor) -> torch.Tensor:
        """The vectors whose products with the summaries are the scores.

        Args:
            query: float32 ``[rows, g, q, D]``, the queries of the ``g`` query heads of each row.

        Returns:
            ``[rows, q, vectors * D]``, for all query heads together.
        """
        weights, total = self.size_weights, query.sum(1)
        if weights is None:
            raise NotImplementedError
        if weights == (0.0,):
            return total
        size = torch.linalg.vector_norm(query, 1, 1).unsqueeze(-2)
        return torch.addcmul(total.unsqueeze(-2), size, _on_device(weights, query.device)).flatten(-2)

    def score(self, question: Question) -> torch.Tensor:
        """Scores float32 ``[rows, q, columns]``; the largest are picked."""
        raise NotImplementedError


@lru_cache
def _on_device(weights: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """One or two weights as a column, made on the device."""
    return torch.linspace(weights[0], weights[-1], len(weights), dtype=torch.float32, device=device).unsqueeze(1)
