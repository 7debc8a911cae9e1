"""What a policy sees of one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from hf_kvcache.kernels.inputs import Scoring

#: Probabilities computed at a time, never all queries times all keys: on a CPU as many as stay in a core's cache,
#: elsewhere as many as take 64 MiB, since every strip is some launches.
_STRIP_ELEMENTS = 1 << 19
_STRIP_ELEMENTS_ELSEWHERE = 1 << 24
_FEWEST_QUERIES = 16


class Rope(Protocol):
    """The rotary embedding of a layer."""

    @property
    def frequencies(self) -> torch.Tensor:
        """float32 ``[D' / 2]``, radians per position; ``D'`` is the part of the head that is rotated."""

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``x [..., n, D]`` rotated to ``positions`` (``[n]`` or ``[..., n]``), in float32."""

    def unrotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`rotate`."""

    def pairs(self, x: torch.Tensor) -> torch.Tensor:
        """The rotated part of ``x [..., D]`` as complex numbers ``[..., D' / 2]``, by frequency.

        Rotating to position ``p`` multiplies pair ``f`` by ``exp(1j * p * frequencies[f])``.
        """


@dataclass
class Context:
    """The tokens that a layer holds when it has to choose, in the order of their positions, never padding.

    Sequences that hold different numbers of tokens are shown one by one, so that a row of a padded batch is scored as
    it would be alone.

    Attributes:
        keys: ``[B, Hkv, T, Dk]`` after rotary positions, float32, as decoded from the pages.
        values: ``[B, Hkv, T, Dv]``, the same.
        positions: int64 ``[B, Hkv, T]``, original positions, counted over non-padding tokens; ascending, a large number
            where there is no token.
        held: bool ``[B, Hkv, T]``, False where there is no token, always behind the others (heads may hold different
            numbers); None if there is one everywhere. Keys and values are zero there.
        protected: bool ``[B, Hkv, T]``, tokens that stay whatever their score: sinks, recent window, pins.
        seen: position of the next token.
        quota: tokens that a head keeps on average, protected ones included.
        scoring: how the model scores queries against keys.
        layer: index of the layer in the model.
        layers: number of layers of the model, of whatever type.
        queries: ``[B, Hq, n, Dk]``, the latest queries that the policy asked for, oldest first, after rotary positions,
            not scaled; None if it asked for none.
        query_positions: int64 ``[n]`` or ``[B, n]``, their positions.
        accumulated: float32 ``[B, Hkv, T]``, attention probability that each key received from all queries that came at
            or after it, summed over them and averaged over the query heads of its group; None if not asked for.
        replayed: float32 ``[B, Hkv, T]``, the largest probability that any replayed query of the group gave each key;
            ``[B, Hkv, g, T]`` by query head, each probability over the length of the query's hidden state, for policies
            with ``replay_by_head``. For those with ``replay_squares`` the root mean square over the queries, of
            probabilities over the context alone. None if not asked for.
        gated: float32 ``[B, Hkv, T]``, what the policy's own ``gate_scores`` gave each token when it came; None if not
            asked for.
        rope: the layer's rotary embedding; None if not asked for.
        output_weight: ``[hidden, Hq * Dv]``, the weight of the output projection; None if not asked for.
        seed: for policies that draw random numbers.
        bias: float32 ``[B, Hkv, T]``, what is added to the scores of each key, since kept keys stand for others; None
            for nothing.
        aligned: whether all heads are known to hold the same tokens.
        reach: gives the number of places, from the first on, that hold all that query ``i`` sees, in the head that
            needs most. The host knows it, and so need not ask the device; None where it has to.
        reach_of: the queries that ``reach`` counts for. With others in their place the device is asked.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    held: torch.Tensor | None
    protected: torch.Tensor
    seen: int
    quota: int
    scoring: Scoring
    layer: int
    layers: int
    queries: torch.Tensor | None = None
    query_positions: torch.Tensor | None = None
    accumulated: torch.Tensor | None = None
    replayed: torch.Tensor | None = None
    gated: torch.Tensor | None = None
    rope: Rope | None = None
    output_weight: torch.Tensor | None = None
    seed: int = 0
    bias: torch.Tensor | None = None
    aligned: bool = False
    reach: Callable[[int], int] | None = None
    reach_of: torch.Tensor | None = None

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        assert self.queries is not None
        return self.queries.shape[1] // self.keys.shape[1]

    def latest(self, count: int) -> Context:
        """The same with the latest ``count`` queries only; itself where it has no more."""
        more = 0 if self.queries is None else self.queries.shape[2] - count
        if more <= 0:
            return self
        assert self.queries is not None and self.query_positions is not None
        queries, reach = self.queries[:, :, more:], self.reach
        known = reach is not None and self.queries is self.reach_of
        return replace(
            self,
            queries=queries,
            query_positions=self.query_positions[..., more:],
            reach=(lambda query: reach(query + more)) if reach is not None and known else None,
            reach_of=queries if known else None,
        )

    def generator(self) -> torch.Generator:
        """A source of random numbers for this layer and moment, the same in every run and for every row."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.layer * 10_007 + self.seen)

    def probabilities(self) -> Iterator[torch.Tensor]:
        """Attention probabilities of the queries over the held tokens, some queries at a time.

        Yields:
            float32 ``[B, Hkv, g, n', T]``: softmax over the keys at or before each query, sink logits counted. A query
            that sees nothing has zeros.
        """
        tokens = self.keys.shape[2]
        for part in self._strips():
            yield torch.nn.functional.pad(part, (0, tokens - part.shape[-1])) if part.shape[-1] < tokens else part

    def received(self) -> torch.Tensor:
        """Probability of each key, summed over the queries, for each query head of a group: ``[B, Hkv, g, T]``."""
        batch, heads, tokens, _ = self.keys.shape
        total = torch.zeros(batch, heads, self.groups, tokens, dtype=torch.float32, device=self.keys.device)
        for part in self._strips():
            total[..., : part.shape[-1]] += part.sum(3)
        return total

    def _strips(self) -> Iterator[torch.Tensor]:
        """:meth:`probabilities`, without the keys behind the last query of each strip."""
        assert self.queries is not None and self.query_positions is not None
        batch, heads, tokens, _ = self.keys.shape
        if tokens == 0 or self.queries.shape[2] == 0:
            return  # a sequence of which all is padding so far
        queries = self.queries.float().unflatten(1, (heads, -1)) * self.scoring.inner
        at = self.query_positions.expand(batch, -1)
        elements = _STRIP_ELEMENTS if self.keys.device.type == "cpu" else _STRIP_ELEMENTS_ELSEWHERE
        step = max(_FEWEST_QUERIES, elements // (batch * self.queries.shape[1] * tokens))
        for start in range(0, queries.shape[3], step):
            part = slice(start, start + step)
            seen = max(1, self._reached(at, min(start + step, queries.shape[3]) - 1))
            # The heads of a group as rows of one matrix: broadcasting would copy the keys for each of them.
            rows = queries[:, :, :, part].flatten(2, 3)
            scores = (rows @ self.keys[:, :, :seen].mT).unflatten(2, (queries.shape[2], -1))
            if self.scoring.softcap is not None:
                scores = scores.tanh_().mul_(self.scoring.softcap)
            if self.bias is not None:
                scores = scores + self.bias[:, :, None, None, :seen]
            # Places without a token have positions beyond those of any query.
            hidden = self.positions[:, :, None, :seen] > at[:, None, part, None]
            yield self._softmax(scores.masked_fill_(hidden[:, :, None], -torch.inf))

    def _reached(self, at: torch.Tensor, query: int) -> int:
        """How many places, from the first on, hold all that a query at ``at [B, n]`` sees."""
        if self.reach is not None and self.queries is self.reach_of:
            return self.reach(query)
        return int((self.positions <= at[:, query].max()).sum(-1).max())

    def _softmax(self, scores: torch.Tensor) -> torch.Tensor:
        total = scores.logsumexp(-1, keepdim=True)
        if self.scoring.sink_logits is not None:
            sinks = self.scoring.sink_logits.float().view(1, scores.shape[1], -1, 1, 1)
            total = torch.logaddexp(total, sinks)
        return scores.sub_(total.masked_fill(total == -torch.inf, 0.0)).exp_()
