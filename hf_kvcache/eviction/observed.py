"""Attention of some observed queries over all tokens of a layer, and over those that are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from hf_kvcache.kernels.inputs import Scoring

#: Scores computed at a time, so that no matrix of all queries times all keys is ever held.
_STRIP_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class Observed:
    """The attention of some queries over all tokens, of which some are kept.

    Attributes:
        keys: ``[B, Hkv, T, Dk]``, of all tokens.
        values: ``[B, Hkv, T, Dv]``.
        keep: bool ``[B, Hkv, T]``, the tokens that stay; at least one in each head.
        queries: ``[B, Hq, n, Dk]``, not scaled.
        scoring: how the model scores.
        visible: bool, broadcastable to ``[B, Hkv, n, T]``: which keys a query sees; None for all.
        bias: float32 ``[B, Hkv, T]``, what is added to the scores of each key already; None for nothing.
        most: tokens that the head keeps that keeps most; None if that is to be counted. If it is given, it is taken for
            granted that every head keeps some.

    Raises:
        ValueError: if the shapes do not fit each other, or a head keeps nothing.
    """

    keys: torch.Tensor
    values: torch.Tensor
    keep: torch.Tensor
    queries: torch.Tensor
    scoring: Scoring
    visible: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        places = tuple(self.keys.shape[:3])
        for name in ("values", "keep"):
            found = tuple(getattr(self, name).shape)
            if found[:3] != places:
                raise ValueError(f"{name} has shape {found}; accepted: {places} in front, as keys")
        heads = self.queries.shape[1]
        if self.queries.shape[0] != places[0] or heads % places[1] or self.queries.shape[-1] != self.keys.shape[-1]:
            raise ValueError(f"queries has shape {tuple(self.queries.shape)}, which does not fit keys of {places}")
        if self.keep.dtype != torch.bool or (self.most is None and not self.keep.any(-1).all()):
            raise ValueError("keep has heads without a kept token, or is not bool; accepted: at least one in each head")

    @cached_property
    def places(self) -> torch.Tensor:
        """int64 ``[B, Hkv, C]``, the kept tokens in their order; behind them, places of other tokens."""
        count = int(self.keep.sum(-1).max()) if self.most is None else self.most
        return (~self.keep).to(torch.int8).argsort(dim=-1, stable=True)[..., :count]

    @cached_property
    def is_kept(self) -> torch.Tensor:
        """bool ``[B, Hkv, C]``, which of :attr:`places` are kept tokens."""
        return self.keep.gather(-1, self.places)

    def of_kept(self, x: torch.Tensor) -> torch.Tensor:
        """``x [B, Hkv, T, ...]`` at the kept places, float64 ``[B, Hkv, C, ...]``."""
        index = self.places
        if x.dim() == 4:
            index = index[..., None].expand(-1, -1, -1, x.shape[-1])
        return x.gather(2, index).double()

    def back(self, x: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        """A copy of ``into [B, Hkv, T, ...]`` with ``x [B, Hkv, C, ...]`` at the places of kept tokens."""
        index, kept = self.places, self.is_kept
        if x.dim() == 4:
            index, kept = index[..., None].expand_as(x), kept[..., None]
        x = x.to(into.dtype)
        return into.scatter(2, index, torch.where(kept, x, into.gather(2, index)))

    def strips(self) -> Iterator[Strip]:
        """The queries of each group, some at a time."""
        batch, heads, tokens, _ = self.keys.shape
        queries = self.queries.double().unflatten(1, (heads, -1)) * self.scoring.inner
        keys = self.keys.double().mT
        sinks = self.scoring.sink_logits
        for member in range(queries.shape[2]):
            sink = None if sinks is None else sinks.double().view(heads, -1)[:, member].view(1, heads, 1, 1)
            for rows in torch.arange(queries.shape[3], device="cpu").split(
                max(1, _STRIP_ELEMENTS // (batch * heads * tokens))
            ):
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                logits = queries[:, :, member, part] @ keys
                if self.scoring.softcap is not None:
                    logits = self.scoring.softcap * logits.tanh()
                if self.bias is not None:
                    logits = logits + self.bias.double()[:, :, None]
                if self.visible is not None:
                    seen = self.visible.expand(batch, heads, queries.shape[3], tokens)[:, :, part]
                    logits = logits.masked_fill(~seen, -torch.inf)
                yield Strip(self, logits, sink)


@dataclass(frozen=True)
class Strip:
    """Scores of some queries, float64 ``[B, Hkv, m, T]``, and the group member's sink logit ``[1, Hkv, 1, 1]``."""

    of: Observed
    logits: torch.Tensor
    sink: torch.Tensor | None

    def kept(self) -> torch.Tensor:
        """The scores of the kept keys ``[B, Hkv, m, C]``."""
        index = self.of.places[:, :, None].expand(-1, -1, self.logits.shape[2], -1)
        return self.logits.gather(-1, index).masked_fill(~self.of.is_kept[:, :, None], -torch.inf)

    @property
    def sees(self) -> torch.Tensor:
        """bool ``[B, Hkv, m]``, whether a query sees any token."""
        return self.logits.amax(-1) > -torch.inf

    def shares(self) -> torch.Tensor:
        """Exponential scores of the kept keys, over the sum of those of all keys."""
        return (self.kept() - finite(self.logits.logsumexp(-1, keepdim=True))).exp()

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Softmax, the sink counted; zeros for a query that sees nothing."""
        total = logits.logsumexp(-1, keepdim=True)
        if self.sink is not None:
            total = torch.logaddexp(total, self.sink)
        return (logits - finite(total)).exp()

    def output(self) -> torch.Tensor:
        """What attention over all tokens gives ``[B, Hkv, m, Dv]``."""
        return self.probabilities(self.logits) @ self.of.values.double()


def finite(total: torch.Tensor) -> torch.Tensor:
    """Zero where there is nothing to sum, so that the exponentials there are 0 and not undefined."""
    return total.masked_fill(total == -torch.inf, 0.0)
