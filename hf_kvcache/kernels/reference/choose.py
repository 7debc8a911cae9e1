"""The choice of pages by queries and vectors in 8 bits, in plain torch, as every backend makes it."""

from __future__ import annotations

import math

import torch

from hf_kvcache.kernels.inputs import MassRule, Sharing

#: A column behind all others, which stands for no page.
NO_COLUMN = 1 << 30


def choose(
    query: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    spans: int,
    count: int,
    limits: torch.Tensor | None,
    missing: torch.Tensor | None,
) -> torch.Tensor:
    """The pages with the best scores for each query token.

    Args:
        query: float32 ``[rows, q, W]``, for all query heads together.
        codes: int8 ``[rows, columns * spans, W]``, the vectors of each part of a page.
        scales: float16 ``[rows, columns * spans]``, above 0. A page has the score of its best part.
        spans: parts of a page.
        count: how many pages a query token chooses.
        limits: int64 ``[rows]``, how many of them a row may have; None if all may have ``count``.
        missing: bool ``[rows, columns]``, True where a row has no page; None if there is a page everywhere.

    Returns:
        int64 ``[rows, n]``; see :func:`best_columns`.
    """
    scores = torch.bmm(query, codes.float().transpose(1, 2))
    scores.mul_(scales.unsqueeze(1))
    if spans > 1:
        scores = scores.unflatten(2, (-1, spans)).amax(3)
    return best_columns(scores, count, limits, missing)


def choose_by_mass(
    query: torch.Tensor,
    rule: MassRule,
    codes: torch.Tensor,
    scales: torch.Tensor,
    spans: int,
    count: int,
    limits: torch.Tensor | None,
    missing: torch.Tensor | None,
) -> torch.Tensor:
    """The pages to which the query heads of a row are expected to pay the most attention.

    Args:
        query: float32 ``[rows, g, q, D]``, the queries of the ``g`` query heads of each row.
        rule: how attention is estimated.
        codes: int8 ``[rows, columns * spans, D + D / band]``, mean and standard deviation of the keys in each part of a
            page.
        scales: as in :func:`choose`, like the rest.

    Returns:
        int64 ``[rows, n]``; see :func:`best_columns`.
    """
    mass = _masses(query, rule, codes, scales, spans, missing)
    probabilities = mass.flatten(3).softmax(3).view(mass.shape).sum((1, 4))
    return best_columns(probabilities, count, limits, missing)


def choose_across_heads(
    query: torch.Tensor,
    rule: MassRule,
    codes: torch.Tensor,
    scales: torch.Tensor,
    spans: int,
    limits: torch.Tensor | None,
    missing: torch.Tensor | None,
    heads: int,
    sharing: Sharing,
) -> torch.Tensor:
    """As :func:`choose_by_mass`, where the KV heads of a sequence share the number of pages that they may have.

    Where pages have equal scores, those of the first heads are chosen, and of one head those that come first.

    Args:
        query: as in :func:`choose_by_mass`, like what is not named here.
        limits: int64 ``[rows]``, how many pages a row brings; None if all bring ``sharing.count``.
        heads: KV heads of a sequence.
        sharing: how the heads share.

    Returns:
        int64 ``[rows, n]``; see :func:`best_columns`. For one query token ``n`` is twice ``sharing.count``, or the
        number of columns if that is less.
    """
    mass = _masses(query, rule, codes, scales, spans, missing)
    known = torch.bmm(query.flatten(1, 2), sharing.sinks.transpose(1, 2)).mul_(rule.scaling)
    known.sub_(math.log(sharing.tokens))
    every = torch.cat([mass.flatten(3), known.unflatten(1, query.shape[1:3])], 3)
    scores = every.softmax(3)[..., : codes.shape[1]].reshape(mass.shape).sum((1, 4))
    if missing is not None:
        scores = scores.masked_fill(missing[:, None], -torch.inf)
    return _union(_best_of_heads(scores, sharing.count, limits, heads), scores.shape[2])


def _masses(
    query: torch.Tensor,
    rule: MassRule,
    codes: torch.Tensor,
    scales: torch.Tensor,
    spans: int,
    missing: torch.Tensor | None,
) -> torch.Tensor:
    """The logarithm of the expected attention to each part of a page, float32 ``[rows, g, q, columns, spans]``.

    Arguments are those of :func:`choose_by_mass`.
    """
    dim = query.shape[3]
    mean, deviation = codes.float().split([dim, codes.shape[2] - dim], 2)
    scales, asked = scales.float()[:, None] * rule.scaling, query.flatten(1, 2)
    squares = asked.square().unflatten(2, (-1, rule.band)).mean(3)
    spread = torch.bmm(squares, deviation.square().transpose(1, 2)).sqrt_().mul_(scales)
    reach = rule.reach
    more = torch.where(spread < reach, spread.square() / 2, reach * (spread - reach / 2))
    mass = (
        torch.baddbmm(more, asked, mean.transpose(1, 2) * scales)
        .unflatten(2, (-1, spans))
        .unflatten(1, query.shape[1:3])
    )
    if missing is not None:
        mass = mass.masked_fill(missing[:, None, None, :, None], -torch.inf)
    return mass


def best_columns(
    scores: torch.Tensor, count: int, limits: torch.Tensor | None, missing: torch.Tensor | None
) -> torch.Tensor:
    """The columns with the largest scores of each row, ascending.

    Args:
        scores: float32 ``[rows, q, columns]``.
        count: how many are chosen for each query token.
        limits: as in :func:`choose`.
        missing: as in :func:`choose`.

    Returns:
        int64 ``[rows, n]``, the union over the query tokens; numbers behind the last column stand for no page. ``n`` is
        ``count`` for one query token. For several of them nothing is read back from a GPU, where ``n`` is as large as
        the union can be.
    """
    if missing is not None:
        scores = scores.masked_fill(missing[:, None], -torch.inf)
    device = scores.device
    best = scores.topk(count, 2).indices
    if limits is not None:
        best = best.masked_fill(torch.arange(count, device=device) >= limits[:, None, None], NO_COLUMN)
    return _union(best, scores.shape[2])


def _best_of_heads(scores: torch.Tensor, count: int, limits: torch.Tensor | None, heads: int) -> torch.Tensor:
    """The columns with the largest scores of the heads of a sequence, as many as these may have together.

    Args:
        scores: float32 ``[rows, q, columns]``, ``-inf`` where there is no page.
        count: how many pages a row brings, unless ``limits`` says otherwise.
        limits: as in :func:`choose_across_heads`, like the rest.

    Returns:
        int64 ``[rows, q, n]``, ``NO_COLUMN`` where nothing is chosen.
    """
    rows, _, columns = scores.shape
    most, device = min(columns, 2 * count), scores.device
    best, order = (x[..., :most] for x in scores.sort(dim=2, descending=True, stable=True))
    if limits is None:
        limits = torch.full((rows,), count, dtype=torch.int64, device=device)
    best = best.masked_fill(torch.arange(most, device=device) >= 2 * limits[:, None, None], -torch.inf)
    # [B, q, heads * most]: the place of each candidate among those of all heads.
    together = best.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)
    places = together.sort(dim=2, descending=True, stable=True).indices.argsort(2)
    chosen = places < limits.view(-1, 1, heads).sum(2, keepdim=True)
    return order.masked_fill(~chosen.unflatten(2, (heads, most)).transpose(1, 2).flatten(0, 1), NO_COLUMN)


def _union(best: torch.Tensor, columns: int) -> torch.Tensor:
    """The columns ``[rows, q, n]`` that any query token has chosen, as :func:`best_columns` returns them."""
    count, device = best.shape[2], best.device
    if best.shape[1] == 1:
        return best[:, 0].sort(1).values
    # One place more takes the numbers that stand for no page.
    chosen = torch.zeros(best.shape[0], columns + 1, dtype=torch.bool, device=device)
    chosen.scatter_(1, best.clamp(max=columns).flatten(1), True)
    chosen = chosen[:, :columns]
    most = min(columns, count * best.shape[1])
    if device.type == "cpu":
        most = max(1, int(chosen.sum(1).max()))
    return torch.arange(columns, device=device).masked_fill(~chosen, NO_COLUMN).sort(1).values[:, :most]
