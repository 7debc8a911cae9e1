"""Attention over pages of low-rank coefficients and full-precision tokens.

With ``x = coefficients up + mean``, a score ``q . x`` is ``(q up^T) . coefficients + q . mean``. An average of values
is the average of their coefficients, times ``up``, plus ``mean``. So the query is projected once, the output is
projected back once, and no cached token needs any computation of its own. Where that does not hold (keys stored before
their rotary embedding, or a mean under soft-capping), keys are decoded a tile of pages at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hf_kvcache.kernels.attention import attend, without_gradient
from hf_kvcache.kernels.hadamard import rotate
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.pack import decode_side
from hf_kvcache.kernels.reference import decode as reference
from hf_kvcache.kernels.reference.levels import page_output
from hf_kvcache.kernels.reference.softmax import OnlineSoftmax, merge
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.lowrank.projection import LayerProjection
from hf_kvcache.storage import PagedStorage


@dataclass(frozen=True)
class HeadMaps:
    """A layer's projection as one map per head, in the form that attention needs; all float32.

    Attributes:
        query: ``[Hkv, Dk, rk]``, maps queries so that their scores with coefficients are their scores with keys.
        output: ``[Hkv, rv, Dv]``, maps sums of coefficients to sums of values.
        key_mean: ``[Hkv, Dk, 1]``, or None.
        value_mean: ``[Hkv, 1, Dv]``, or None.
        groups: number of groups of heads that share coefficients.
    """

    query: torch.Tensor
    output: torch.Tensor
    key_mean: torch.Tensor | None
    value_mean: torch.Tensor | None
    groups: int

    @classmethod
    def of(cls, projection: LayerProjection) -> HeadMaps:
        """The maps of a layer's heads, which may share coefficients."""
        group = projection.heads // projection.groups
        keys, values = (side.up.unflatten(2, (group, -1)) for side in (projection.keys, projection.values))
        key_mean, value_mean = (
            None if side.mean is None else side.mean.reshape(projection.heads, -1)
            for side in (projection.keys, projection.values)
        )
        return cls(
            query=keys.permute(0, 2, 3, 1).flatten(0, 1).contiguous(),
            output=values.permute(0, 2, 1, 3).flatten(0, 1).contiguous(),
            key_mean=None if key_mean is None else key_mean.unsqueeze(2),
            value_mean=None if value_mean is None else value_mean.unsqueeze(1),
            groups=projection.groups,
        )

    def values(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Weighted sums of values ``[B, Hkv, M, Dv]`` from those of coefficients ``[B, Hkv, M, rv]``.

        The weights of each sum add up to 1.
        """
        values = coefficients @ self.output
        return values if self.value_mean is None else values + self.value_mean


def attend_coefficients(
    query: torch.Tensor,
    pages: Pages,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    maps: HeadMaps,
) -> Attention:
    """Attention over pages in the width of the coefficients, merged with attention over full-precision tokens.

    Args:
        query: ``[B, Hq, q, Dk]``.
        pages: pages of coefficients; a row of the table belongs to the heads of a sequence that share coefficients.
        dense: the full-precision tokens, in the model's basis.
        visibility: what the queries may see.
        scoring: how scores are made; without soft-capping, if keys have a mean.
        maps: the layer's maps.
    """
    # The CPU's kernels convert queries to float32 anyway. Converted here, nothing is rounded between the steps.
    wide = query.float() if query.device.type == "cpu" else query
    dense_part = attend(wide, None, dense, visibility, scoring)
    per_head = wide.detach().unflatten(1, (len(maps.query), -1)).flatten(2, 3).float()
    projected = (per_head @ maps.query).view(*query.shape[:3], -1).to(wide.dtype)
    # Sink logits enter the softmax's denominator once, with the full-precision tokens.
    packed = attend(projected, pages, _no_tokens(projected, pages), visibility, replace(scoring, sink_logits=None))
    log_sum_exp = packed.log_sum_exp
    if maps.key_mean is not None:
        log_sum_exp = log_sum_exp + (per_head @ maps.key_mean).view(log_sum_exp.shape) * scoring.scaling
    sums = packed.output.transpose(1, 2).unflatten(1, (len(maps.query), -1)).flatten(2, 3)
    values = maps.values(sums.float()).view(*query.shape[:3], -1).transpose(1, 2)
    output, total = merge(
        (values, log_sum_exp.transpose(1, 2)), (dense_part.output.float(), dense_part.log_sum_exp.transpose(1, 2))
    )
    return Attention(output.to(query.dtype), total.transpose(1, 2))


def attend_tiles(
    query: torch.Tensor,
    pages: Pages,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    maps: HeadMaps,
    storage: PagedStorage,
    sums: bool = False,
) -> Attention:
    """Attention over keys that ``storage`` decodes from its ``pages`` a tile at a time, and coefficients of values.

    The other arguments are those of :func:`attend_coefficients`; any scoring is accepted. With ``sums`` the probability
    of each key is returned as well.
    """

    def read_pages(
        rows: torch.Tensor,
        pages: Pages,
        visibility: Visibility,
        scoring: Scoring,
        queries: slice,
        kept_scores: list[torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _read_tiles(rows, pages, visibility, scoring, queries, kept_scores, maps, storage)

    detached = query.detach()
    result = reference.attend(detached, pages, dense, visibility, scoring, sums, read_pages=read_pages)
    return without_gradient(query, result)


def _read_tiles(
    rows: torch.Tensor,
    pages: Pages,
    visibility: Visibility,
    scoring: Scoring,
    queries: slice,
    kept_scores: list[torch.Tensor] | None,
    maps: HeadMaps,
    storage: PagedStorage,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of scaled queries ``[B * Hkv, M, Dk]`` over all pages, and its log-sum-exp."""
    layout, heads, per_head = pages.layout, len(maps.query), rows.shape[1]
    sharing = rows.shape[0] // pages.rows
    column = 0

    def score(records: torch.Tensor) -> torch.Tensor:
        nonlocal column
        keys = storage.decoded("keys", pages, records, column)
        column += records.shape[0]
        scores = torch.matmul(rows, keys.transpose(1, 2)).view(pages.rows, sharing * per_head, records.shape[0], -1)
        return scores.permute(2, 0, 1, 3).contiguous()

    def combine(records: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return page_output(layout, records, weights, reference.side_buffer(layout, "values", records), decode_side)

    kept: list[torch.Tensor] | None = None if kept_scores is None else []
    state = OnlineSoftmax(pages.rows, sharing * per_head, layout.sides["values"].dim, rows.device)
    reference.walk_pages(state, pages, visibility, scoring, queries, kept, score, combine)
    if kept_scores is not None and kept is not None:
        kept_scores += [scores.view(*rows.shape[:2], -1) for scores in kept]
    sums, log_sum_exp = state.result()
    coefficients = rotate(sums, layout.sides["values"], inverse=True).view(-1, heads, per_head, sums.shape[-1])
    return maps.values(coefficients).flatten(0, 1), log_sum_exp.view(rows.shape[:2])


def _no_tokens(query: torch.Tensor, pages: Pages) -> DenseTokens:
    """No full-precision tokens, in the widths of the coefficients."""
    return DenseTokens(
        *(query.new_empty(len(query), pages.heads, 0, pages.layout.sides[s].dim) for s in ("keys", "values"))
    )
