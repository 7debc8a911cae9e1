"""Compensating for evicted tokens: a bias per kept key and new values (attention matching, arXiv:2602.16284).

Everything here is linear algebra on the attention of some observed queries: kept keys get a weight so that their
exponential scores add up to those of all keys, and values so that the outputs are those of all tokens. What comes out
is exact for the observed queries only as far as the kept tokens can express it, and a guess for all others.

A cache uses :func:`compensate_values` alone: nothing in the package calls :func:`fit_bias`, :func:`output_error` and
:func:`compensate` yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.storage.token_view import TokenView
from hf_kvcache.storage.transfers import ascending_on, rows_of, to_device

#: Of the values that a cache changes. On SmolLM2 (4 WikiText windows, 30 % kept) a ridge of 10 lowered the mean KL of
#: all policies tried, 0.1 raised that of random tokens, and 0.001 fitted the observed queries so well that it doubled
#: two of the three.
_RIDGE = 10.0
#: A kept key may count for up to ``e ** 3`` keys, and no less than the inverse.
LARGEST_BIAS = 3.0
#: Scores computed at a time, so that no matrix of all queries times all keys is ever held.
_STRIP_ELEMENTS = 1 << 21
_STEPS = 300
_POWERS = 20


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

    def strips(self) -> Iterator[_Strip]:
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
                if self.visible is not None:
                    seen = self.visible.expand(batch, heads, queries.shape[3], tokens)[:, :, part]
                    logits = logits.masked_fill(~seen, -torch.inf)
                yield _Strip(self, logits, sink)


@dataclass(frozen=True)
class _Strip:
    """Scores of some queries, float64 ``[B, Hkv, m, T]``, and the group member's sink logit ``[1, Hkv, 1, 1]``."""

    of: Observed
    logits: torch.Tensor
    sink: torch.Tensor | None

    def kept(self) -> torch.Tensor:
        """The scores of the kept keys ``[B, Hkv, m, C]``."""
        index = self.of.places[:, :, None].expand(-1, -1, self.logits.shape[2], -1)
        return self.logits.gather(-1, index).masked_fill(~self.of.is_kept[:, :, None], -torch.inf)

    def shares(self) -> torch.Tensor:
        """Exponential scores of the kept keys, over the sum of those of all keys."""
        return (self.kept() - _finite(self.logits.logsumexp(-1, keepdim=True))).exp()

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Softmax, the sink counted; zeros for a query that sees nothing."""
        total = logits.logsumexp(-1, keepdim=True)
        if self.sink is not None:
            total = torch.logaddexp(total, self.sink)
        return (logits - _finite(total)).exp()

    def output(self) -> torch.Tensor:
        """What attention over all tokens gives ``[B, Hkv, m, Dv]``."""
        return self.probabilities(self.logits) @ self.of.values.double()


def compensate_values(
    held: TokenView,
    keep: torch.Tensor,
    fixed: torch.Tensor,
    query: torch.Tensor,
    at: np.ndarray,
    scoring: Scoring,
    most: int,
) -> None:
    """Give kept tokens that are not packed yet new values that make up for the evicted tokens, for these queries.

    The values are written where they lie, before they are packed.

    Args:
        held: the tokens of some sequences; the values in their dense buffer are changed.
        keep: bool ``[b, Hkv, T]``, the tokens that stay, at least one in each head.
        fixed: bool ``[b, Hkv, T]``, tokens whose values stay as they are.
        query: ``[b, Hq, n, Dk]``, not scaled.
        at: int64 ``[b, n]``, their positions.
        scoring: how the model scores.
        most: tokens that the head keeps that keeps most.
    """
    used, slots = held.used, held.slots
    visible = held.positions[:, :, None] <= ascending_on(query.device, at)[:, None, :, None]
    kept = keep if held.everywhere else keep & held.exists
    observed = Observed(held.states("keys"), held.states("values"), kept, query, scoring, visible, most)
    fixed = fixed | (slots >= used)
    values = fit_values(observed, None, fixed, _RIDGE)
    buffer = rows_of(held.storage.dense.values, held.rows)[:, :, :used]
    # One slot more takes what does not change.
    changed = torch.nn.functional.pad(buffer, (0, 0, 0, 1))
    index = slots.masked_fill(~kept | fixed, used)[..., None].expand(-1, -1, -1, values.shape[-1])
    changed.scatter_(2, index, values.to(buffer.dtype))
    rows = slice(None) if len(held.rows) == held.storage.batch else to_device(held.rows, query.device)
    held.storage.dense.values[rows, :, :used] = changed[:, :, :used]


def fit_bias(observed: Observed, ridge: float = 1e-3) -> torch.Tensor:
    """Logarithms of weights that make the kept keys weigh as much as all keys.

    Non-negative least squares within bounds: ``sum_c w_c exp(q . k_c)`` over the sum for all keys is to be 1 for every
    observed query. Keys are shared by the query heads of a group, and so are the weights.

    Args:
        observed: the attention to be matched.
        ridge: weight of the squared distance from weights of 1, in units of the mean squared share of a key.

    Returns:
        float32 ``[B, Hkv, T]``, to be added to the scores of the kept keys; within ``LARGEST_BIAS`` of 0, and 0 where
        nothing is kept.
    """
    _check_ridge(ridge)
    batch, heads, count = observed.is_kept.shape
    gram = torch.zeros(batch, heads, count, count, dtype=torch.float64, device=observed.keys.device)
    wanted = gram.new_zeros(batch, heads, count)
    for strip in observed.strips():
        shares = strip.shares()
        gram += shares.mT @ shares
        wanted += shares.sum(2)
    penalty = ridge * _mean_of_kept(gram.diagonal(dim1=-2, dim2=-1), observed.is_kept)
    gram.diagonal(dim1=-2, dim2=-1).add_(penalty)
    bounds = (
        float(torch.tensor(-LARGEST_BIAS, device="cpu").double().exp()),
        float(torch.tensor(LARGEST_BIAS, device="cpu").double().exp()),
    )
    weights = _bounded_least_squares(gram, wanted + penalty, *bounds)
    bias = weights.log().clamp(-LARGEST_BIAS, LARGEST_BIAS)
    return observed.back(bias, observed.keys.new_zeros(observed.keep.shape, dtype=torch.float32))


def fit_values(
    observed: Observed, bias: torch.Tensor | None = None, fixed: torch.Tensor | None = None, ridge: float = 1e-3
) -> torch.Tensor:
    """Values that make attention over the kept tokens give what attention over all of them gives.

    Ridge least squares around the values as they are, so that tokens which no observed query looks at keep theirs, and
    the error over the observed queries is never larger than it was.

    Args:
        observed: the attention to be matched.
        bias: ``[B, Hkv, T]``, added to the scores of the kept keys; None for none.
        fixed: bool ``[B, Hkv, T]``, tokens whose values stay as they are; None for none.
        ridge: weight of the squared change, in units of the mean squared probability of a key.

    Returns:
        ``[B, Hkv, T, Dv]`` in the dtype of the values, which differ from them for kept tokens only.
    """
    _check_ridge(ridge)
    batch, heads, count = observed.is_kept.shape
    values = observed.of_kept(observed.values)
    added = None if bias is None else observed.of_kept(bias)[:, :, None]
    free = observed.is_kept if fixed is None else observed.is_kept & ~fixed.gather(-1, observed.places)
    gram = values.new_zeros(batch, heads, count, count)
    missing = torch.zeros_like(values)
    for strip in observed.strips():
        kept = strip.probabilities(strip.kept() if added is None else strip.kept() + added)
        error = strip.output() - kept @ values
        kept = kept * free[:, :, None]
        gram += kept.mT @ kept
        missing += kept.mT @ error
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += ridge * _mean_of_kept(diagonal, free) + count * torch.finfo(torch.float64).eps * diagonal.amax(
        -1, keepdim=True
    )
    # A token that no query looks at, or that may not change, has an equation of its own: no change.
    diagonal += (diagonal <= torch.finfo(torch.float64).tiny) | ~free
    change = torch.cholesky_solve(missing, torch.linalg.cholesky(gram))
    return observed.back(values + change, observed.values)


def output_error(
    observed: Observed, bias: torch.Tensor | None = None, values: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared distance between the output over the kept tokens and that over all, float64 ``[B, Hkv]``, summed.

    Args:
        observed: the queries and the attention to be matched.
        bias: ``[B, Hkv, T]``, added to the scores of the kept keys; None for none.
        values: ``[B, Hkv, T, Dv]`` in place of those of the kept tokens; None for their own.
    """
    kept_values = observed.of_kept(observed.values if values is None else values)
    added = None if bias is None else observed.of_kept(bias)[:, :, None]
    total = torch.zeros(observed.is_kept.shape[:2], dtype=torch.float64, device=observed.keys.device)
    for strip in observed.strips():
        kept = strip.probabilities(strip.kept() if added is None else strip.kept() + added)
        total += (kept @ kept_values - strip.output()).square().sum((-1, -2))
    return total


def compensate(
    observed: Observed, fixed: torch.Tensor | None = None, ridge: float = 1e-3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bias and values for the kept tokens that are, head by head, never worse than none.

    A bias makes up for the lost attention and may yet turn the output the wrong way, where kept keys point to other
    values than the evicted ones did; such a head gets new values only.

    Args:
        observed: the attention to be matched.
        fixed: bool ``[B, Hkv, T]``, tokens whose values stay as they are (their bias is fitted all the same).
        ridge: as in :func:`fit_bias` and :func:`fit_values`.

    Returns:
        The bias, float32 ``[B, Hkv, T]``, and the values ``[B, Hkv, T, Dv]``.
    """
    bias = fit_bias(observed, ridge)
    with_bias, without = fit_values(observed, bias, fixed, ridge), fit_values(observed, None, fixed, ridge)
    better = output_error(observed, bias, with_bias) <= output_error(observed, None, without)
    return bias * better[..., None], torch.where(better[..., None, None], with_bias, without)


def _bounded_least_squares(gram: torch.Tensor, wanted: torch.Tensor, least: float, most: float) -> torch.Tensor:
    """``[..., C]``: minimizes ``w G w / 2 - w . wanted`` within bounds, by accelerated projected gradient steps.

    The steps are taken in units in which every diagonal element is 1, since keys differ by orders of magnitude in what
    they receive. The momentum starts again whenever it points uphill, which makes the steps converge linearly.
    """
    unit = gram.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
    gram, wanted = gram * unit[..., None] * unit[..., None, :], wanted * unit
    steepness = _largest_eigenvalue(gram).clamp_min(torch.finfo(gram.dtype).tiny)
    weights = 1 / unit
    ahead, momentum = weights, torch.ones_like(steepness)
    for _ in range(_STEPS):
        gradient = (gram @ ahead[..., None]).squeeze(-1) - wanted
        stepped = (ahead - gradient / steepness).clamp(least / unit, most / unit)
        uphill = ((ahead - stepped) * (stepped - weights)).sum(-1, keepdim=True) > 0
        momentum = torch.where(uphill, 1.0, momentum)
        following = (1 + (1 + 4 * momentum**2).sqrt()) / 2
        ahead = stepped + torch.where(uphill, 0.0, (momentum - 1) / following) * (stepped - weights)
        weights, momentum = stepped, following
    return weights * unit


def _largest_eigenvalue(gram: torch.Tensor) -> torch.Tensor:
    """``[..., 1]``, an upper bound that power iteration makes tight; ``gram [..., C, C]`` is nowhere negative."""
    vector = torch.ones_like(gram[..., 0])
    for _ in range(_POWERS):
        vector = (gram @ vector[..., None]).squeeze(-1)
        vector = vector / vector.amax(-1, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
    grown = (gram @ vector[..., None]).squeeze(-1)
    # For a positive vector the largest quotient is a bound (Collatz, Wielandt).
    return torch.where(vector > 0, grown / vector, 0.0).amax(-1, keepdim=True)


def _mean_of_kept(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """``[B, Hkv, 1]``, the mean of ``x [B, Hkv, C]`` over the kept tokens."""
    return (x * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1)


def _check_ridge(ridge: float) -> None:
    if ridge < 0:
        raise ValueError(f"ridge={ridge!r}; accepted: numbers from 0")


def _finite(total: torch.Tensor) -> torch.Tensor:
    """Zero where there is nothing to sum, so that the exponentials there are 0 and not undefined."""
    return total.masked_fill(total == -torch.inf, 0.0)
