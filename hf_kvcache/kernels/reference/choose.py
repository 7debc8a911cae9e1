"""The choice of pages by queries and vectors in 8 bits, in plain torch, as every backend makes it."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.inputs import MassRule

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
        codes: int8 ``[rows, columns * spans, 2 * D]``, mean and standard deviation of the keys in each part of a page.
        scales: as in :func:`choose`, like the rest.

    Returns:
        int64 ``[rows, n]``; see :func:`best_columns`.
    """
    mean, deviation = codes.float().chunk(2, 2)
    scales, asked = scales.float()[:, None] * rule.scaling, query.flatten(1, 2)
    spread = torch.bmm(asked.square(), deviation.square().transpose(1, 2)).sqrt_().mul_(scales)
    reach = rule.reach
    more = torch.where(spread < reach, spread.square() / 2, reach * (spread - reach / 2))
    # [rows, g, q, columns, spans]
    mass = (
        torch.baddbmm(more, asked, mean.transpose(1, 2) * scales)
        .unflatten(2, (-1, spans))
        .unflatten(1, query.shape[1:3])
    )
    if missing is not None:
        mass = mass.masked_fill(missing[:, None, None, :, None], -torch.inf)
    probabilities = mass.flatten(3).softmax(3).view(mass.shape).sum((1, 4))
    return best_columns(probabilities, count, limits, missing)


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
    columns, device = scores.shape[2], scores.device
    best = scores.topk(count, 2).indices
    if limits is not None:
        best = best.masked_fill(torch.arange(count, device=device) >= limits[:, None, None], NO_COLUMN)
    if best.shape[1] == 1:
        return best[:, 0].sort(1).values
    # One place more takes the numbers that stand for no page.
    chosen = torch.zeros(scores.shape[0], columns + 1, dtype=torch.bool, device=device)
    chosen.scatter_(1, best.clamp(max=columns).flatten(1), True)
    chosen = chosen[:, :columns]
    most = min(columns, count * best.shape[1])
    if device.type == "cpu":
        most = max(1, int(chosen.sum(1).max()))
    return torch.arange(columns, device=device).masked_fill(~chosen, NO_COLUMN).sort(1).values[:, :most]
