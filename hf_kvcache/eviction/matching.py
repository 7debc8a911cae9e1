"""Attention matching (arXiv:2602.16284): kept tokens stand for all, by a bias of each key and by new values.

A kept key gets a weight, the exponential of its bias, so that the exponential scores of the kept keys add up to those
of all keys. Then the values are chosen so that the outputs are those of all tokens. Both are least squares over
reference queries. What comes out is as good for other queries as these are like them.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from hf_kvcache.eviction.compensation import check_ridge, fit_values, mean_of_kept, observed_of, store_values
from hf_kvcache.eviction.observed import Observed
from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.storage.token_view import TokenView

#: A kept key may count for up to ``e ** 3`` keys, and no less than the inverse, as the paper recommends.
LARGEST_BIAS = 3.0
_BIAS_RIDGE = 1e-2
_VALUE_RIDGE = 0.1
_STEPS = 300
_POWERS = 20


def match_attention(
    held: TokenView,
    keep: torch.Tensor,
    fixed: torch.Tensor,
    query: torch.Tensor,
    at: np.ndarray | None,
    scoring: Scoring,
    most: int,
) -> torch.Tensor:
    """Fit the kept tokens that are not packed yet to the attention of some queries over all tokens held.

    The new values are written where they lie, before they are packed. Tokens in pages keep their bias and their
    values.

    Args:
        held: the tokens of some sequences; the values in their dense buffer are changed.
        keep: bool ``[b, Hkv, T]``, the tokens that stay, at least one in each head.
        fixed: bool ``[b, Hkv, T]``, tokens whose values stay as they are and that get no bias.
        query: ``[b, Hq, n, Dk]``, not scaled.
        at: int64 ``[b, n]``, their positions; None if they see all tokens held.
        scoring: how the model scores.
        most: tokens that the head keeps that keeps most.

    Returns:
        float16 ``[b, Hkv, slots in use]``, the bias of each token of the dense buffer.
    """
    observed = observed_of(held, keep, query, at, scoring, most)
    fixed = fixed | (held.slots >= held.used)
    # Rounded as it is stored, so that the values are fitted to what attention will see.
    bias = fit_bias(observed, fixed, _BIAS_RIDGE).half()
    store_values(held, observed.keep & ~fixed, fit_values(observed, bias, fixed, _VALUE_RIDGE))
    by_slot = bias.new_zeros(*bias.shape[:2], held.used + 1)
    index = held.slots.masked_fill(~observed.keep | fixed, held.used)
    return by_slot.scatter_(2, index, bias)[..., : held.used]


def fit_bias(observed: Observed, fixed: torch.Tensor | None = None, ridge: float = 1e-3) -> torch.Tensor:
    """Logarithms of weights that make the kept keys weigh as much as all keys.

    Non-negative least squares within bounds: ``sum_c w_c exp(q . k_c)`` over the sum for all keys is to be 1 for every
    observed query. Keys are shared by the query heads of a group, and so are the weights.

    Args:
        observed: the attention to be matched.
        fixed: bool ``[B, Hkv, T]``, tokens whose weight stays 1; None for none.
        ridge: weight of the squared distance from weights of 1, in units of the mean squared share of a key.

    Returns:
        float32 ``[B, Hkv, T]``, to be added to the scores of the kept keys; within ``LARGEST_BIAS`` of 0, and 0 where
        nothing is kept.
    """
    check_ridge(ridge)
    batch, heads, count = observed.is_kept.shape
    gram = torch.zeros(batch, heads, count, count, dtype=torch.float64, device=observed.keys.device)
    wanted = gram.new_zeros(batch, heads, count)
    free = observed.is_kept if fixed is None else observed.is_kept & ~fixed.gather(-1, observed.places)
    for strip in observed.strips():
        shares = strip.shares()
        # What the fixed tokens do not weigh is left for the others. A query that sees nothing asks for nothing.
        missing = strip.sees.double() - (shares * ~free[:, :, None]).sum(-1)
        shares = shares * free[:, :, None]
        gram += shares.mT @ shares
        wanted += (shares.mT @ missing[..., None]).squeeze(-1)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    penalty = ridge * mean_of_kept(diagonal, free) + torch.finfo(torch.float64).tiny
    # A token that is fixed, or that no query looks at, has an equation of its own: a weight of 1.
    alone = (diagonal <= torch.finfo(torch.float64).tiny) | ~free
    penalty = torch.where(alone, 1.0, penalty)
    diagonal += penalty
    weights = _bounded_least_squares(gram, wanted + penalty, math.exp(-LARGEST_BIAS), math.exp(LARGEST_BIAS))
    bias = weights.log().clamp(-LARGEST_BIAS, LARGEST_BIAS)
    return observed.back(bias, observed.keys.new_zeros(observed.keep.shape, dtype=torch.float32))


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
