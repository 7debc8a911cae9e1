"""Second moments of queries as keys before their rotary embedding see them."""

from __future__ import annotations

import torch

from hf_kvcache.integration.rope import LayerRope


def average_over_distances(second: torch.Tensor, rope: LayerRope, length: int) -> torch.Tensor:
    """The average of the queries' second moments over their distances from the keys.

    A query ``d`` tokens behind a key has the score ``(R^d q) . k``, with both before their rotary embedding. So the
    metric of an error of ``k`` is ``E[R^d Sq R^-d]``, on average over the distances. In a text of ``length`` tokens
    there are ``length - d`` pairs at distance ``d``.

    Args:
        second: float64 ``[H, D, D]``, second moments of the queries before their rotary embedding.
        rope: the rotary embedding of the layer.
        length: distances are below this number.

    Returns:
        Float64 ``[H, D, D]``.
    """
    angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * rope.frequencies.double().cpu()
    share = torch.arange(length, 0, -1, dtype=torch.float64, device="cpu") / (length * (length + 1) / 2)
    cos, sin = angles.cos(), angles.sin()
    # Means of the products of the cosines and sines of any two pairs, each [D / 2, D / 2].
    cc, ss, cs = ((a.mT * share) @ b for a, b in ((cos, cos), (sin, sin), (cos, sin)))
    order = torch.cat([rope.first, rope.second]).cpu()
    halves = second[:, order][:, :, order].unflatten(1, (2, -1)).unflatten(3, (2, -1))
    rr, ri, ir, ii = (halves[:, a, :, b] for a in (0, 1) for b in (0, 1))
    turned = torch.stack(
        [
            torch.stack([cc * rr - cs * ri - cs.mT * ir + ss * ii, cc * ri + cs * rr - cs.mT * ii - ss * ir], 2),
            torch.stack([cc * ir - cs * ii + cs.mT * rr - ss * ri, cc * ii + cs * ir + cs.mT * ri + ss * rr], 2),
        ],
        1,
    )
    back = order.argsort()
    return turned.flatten(3, 4).flatten(1, 2)[:, back][:, :, back]
