"""Attention over pages and full-precision tokens in plain torch: the definition for every backend."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.page import BIAS, PageLayout
from hf_kvcache.kernels.reference.hadamard import rotate
from hf_kvcache.kernels.reference.levels import SideDecoder, decode_side, page_output, page_scores
from hf_kvcache.kernels.reference.softmax import OnlineSoftmax, dense_attention, merge
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.kernels.workspace import scratch

#: Tokens of each row that are decoded at a time.
CHUNK_TOKENS = 2048
#: Scores computed at a time; a longer block of queries is cut.
_SCORE_ELEMENTS = 1 << 24

#: Attention of the scaled queries of all rows over pages, as :func:`attend_pages` does it.
PageReader = Callable[
    [torch.Tensor, Pages, Visibility, Scoring, slice, "list[torch.Tensor] | None"], tuple[torch.Tensor, torch.Tensor]
]


def attend(
    query: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    sums: bool = False,
    read_pages: PageReader | None = None,
) -> Attention:
    """Attention of new queries over a layer's pages and full-precision tokens.

    Args:
        query: ``[B, Hq, q, Dk]``, in the model's basis.
        pages: the packed tokens, or None.
        dense: the full-precision tokens, those of the queries last; there may be none if there are pages.
        visibility: what the queries may see.
        scoring: how scores are made.
        sums: whether to return the probability of each key as well.
        read_pages: does the attention over the pages, in place of :func:`attend_pages`.

    Returns:
        See :class:`~hf_kvcache.kernels.inputs.Attention`. A query that sees nothing has output 0 and log-sum-exp
        ``-inf`` (or its sink logit).
    """
    batch, query_heads, length, _ = query.shape
    slots = dense.keys.shape[2]
    block = max(1, _SCORE_ELEMENTS // (batch * query_heads * max(slots, CHUNK_TOKENS)))
    if length <= block:
        return _attend_block(query, pages, dense, visibility, scoring, slice(0, length), sums, read_pages)
    parts = []
    for start in range(0, length, block):
        queries = slice(start, min(start + block, length))
        # The tokens of the queries come last. Under causality, this block sees none behind its last query.
        seen = max(0, slots - (length - queries.stop)) if visibility.causal and not sums else slots
        parts.append(
            _attend_block(
                query[:, :, queries], pages, dense.until(seen), visibility, scoring, queries, sums, read_pages
            )
        )
    return Attention(
        torch.cat([p.output for p in parts], 1),
        torch.cat([p.log_sum_exp for p in parts], 2),
        _total([p.page_sums for p in parts]),
        _total([p.dense_sums for p in parts]),
    )


def _total(all_sums: list[torch.Tensor | None]) -> torch.Tensor | None:
    given = [m for m in all_sums if m is not None]
    return torch.stack(given).sum(0) if given else None


def _attend_block(
    query: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    queries: slice,
    sums: bool,
    read_pages: PageReader | None,
) -> Attention:
    batch, query_heads, length, _ = query.shape
    heads = dense.keys.shape[1]
    # All queries that read the same KV head form one matrix: [B * Hkv, g * q, Dk].
    rows = query.float().reshape(batch * heads, -1, query.shape[-1]) * scoring.inner
    bias = None
    if dense.positions is not None:
        at, unused = dense.positions[:, None], None if dense.unused is None else dense.unused[:, None]
        bias = visibility.bias(at, unused, heads, queries)
    elif dense.unused is not None:
        bias = torch.zeros(dense.unused.shape, dtype=torch.float32, device=query.device).masked_fill_(
            dense.unused, -torch.inf
        )
        bias = bias[:, None, None, None]
    dense_scores: list[torch.Tensor] | None = [] if sums else None
    page_scores: list[torch.Tensor] | None = [] if sums else None
    output, log_sum_exp = dense_attention(rows, dense.keys, dense.values, bias, scoring.softcap, dense_scores)
    if pages is not None and pages.columns:
        packed = (read_pages or attend_pages)(rows, pages, visibility, scoring, queries, page_scores)
        output, log_sum_exp = merge((output, log_sum_exp), packed)
    if scoring.sink_logits is not None:
        sinks = scoring.sink_logits.float().reshape(1, heads, -1, 1).expand(batch, -1, -1, length)
        sinks = sinks.reshape(log_sum_exp.shape)
        output = output * torch.sigmoid(log_sum_exp - sinks).unsqueeze(-1)
        log_sum_exp = torch.logaddexp(log_sum_exp, sinks)
    shape = (batch, query_heads, length)
    return Attention(
        output.to(query.dtype).view(*shape, -1).transpose(1, 2).contiguous(),
        log_sum_exp.view(shape),
        _sums(page_scores, log_sum_exp, shape),
        _sums(dense_scores, log_sum_exp, shape),
    )


def _sums(
    scores: list[torch.Tensor] | None, log_sum_exp: torch.Tensor, shape: tuple[int, int, int]
) -> torch.Tensor | None:
    """Probabilities ``[B, Hq, keys]``, summed over the queries, from scores ``[rows, M, keys]`` in parts."""
    if not scores:
        return None
    log_sum_exp = log_sum_exp.masked_fill(log_sum_exp == -torch.inf, 0.0)
    probabilities = (torch.cat(scores, -1) - log_sum_exp.unsqueeze(-1)).exp_()
    return probabilities.view(*shape, -1).sum(2)


def attend_pages(
    rows: torch.Tensor,
    pages: Pages,
    visibility: Visibility,
    scoring: Scoring,
    queries: slice,
    kept_scores: list[torch.Tensor] | None,
    decode: SideDecoder = decode_side,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over pages alone.

    Args:
        rows: float32 ``[B * Hkv, M, Dk]``, the scaled queries of each row in the model's basis.
        pages: the pages.
        visibility: what the queries may see.
        scoring: how scores are made.
        queries: which of the queries of ``visibility`` these are.
        kept_scores: where to append the scores ``[rows, M, n]``, if they are wanted.
        decode: decodes the sides of pages whose scales are not folded.

    Returns:
        Output ``[B * Hkv, M, Dv]`` and log-sum-exp ``[B * Hkv, M]``.
    """
    layout = pages.layout
    keys_format, values_format = layout.sides["keys"], layout.sides["values"]
    rotated = rotate(pages.scale_queries(rows), keys_format)
    # The mean that was subtracted from the packed keys changes all scores of a query alike.
    shift = None if pages.key_mean is None else rotated @ pages.key_mean.unsqueeze(-1)

    def score(records: torch.Tensor) -> torch.Tensor:
        scores = page_scores(layout, records, rotated, side_buffer(layout, "keys", records), decode)
        return scores if shift is None else scores.add_(shift)

    def combine(records: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return page_output(layout, records, weights, side_buffer(layout, "values", records), decode)

    state = OnlineSoftmax(rows.shape[0], rows.shape[1], values_format.dim, rows.device)
    walk_pages(state, pages, visibility, scoring, queries, kept_scores, score, combine)
    output, log_sum_exp = state.result()
    return rotate(output, values_format, inverse=True), log_sum_exp


def walk_pages(
    state: OnlineSoftmax,
    pages: Pages,
    visibility: Visibility,
    scoring: Scoring,
    queries: slice,
    kept_scores: list[torch.Tensor] | None,
    score: Callable[[torch.Tensor], torch.Tensor],
    combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    tokens: int = CHUNK_TOKENS,
) -> None:
    """Compute attention over all pages in ``state``, ``tokens`` of each row at a time.

    Args:
        state: the softmax, which takes scores and weighted values.
        pages: the pages.
        visibility: what the queries may see.
        scoring: how scores are made.
        queries: which of the queries.
        kept_scores: where to append the scores ``[rows, M, n]``, if they are wanted.
        score: gives the scores ``[C, rows, M, P]`` of records ``[C, rows, record_bytes]``.
        combine: gives the sums of their values ``[C, rows, M, Dv]`` by weights ``[C, rows, M, P]``.
        tokens: how many tokens of each row to take at a time.
    """
    step = max(1, tokens // pages.layout.page_size)
    for start in range(0, pages.columns, step):
        stop = min(start + step, pages.columns)
        records = pages.records(start, stop)
        scores = score(records)
        if scoring.softcap is not None:
            scores = scores.tanh_().mul_(scoring.softcap)
        add_bias(scores, pages.layout, records)
        hide_pages(scores, pages, start, stop, visibility, queries)
        if kept_scores is not None:
            # A copy, since the scores are overwritten next; of a single page, flatten alone would give a view.
            kept_scores.append(scores.permute(1, 2, 0, 3).clone(memory_format=torch.contiguous_format).flatten(2))
        state.add(combine(records, state.weigh(scores)))


def add_bias(scores: torch.Tensor, layout: PageLayout, records: torch.Tensor) -> None:
    """Add the bias of each token of ``records [C, rows, record_bytes]``, if there is one, to its scores, in place.

    Args:
        scores: ``[C, rows, M, P]``.
        layout: of the records.
        records: the pages. What a place without a token gets is hidden afterwards, so it may be anything.
    """
    bias = layout.view(records, BIAS)
    if bias is not None:
        scores.add_(bias.float().unsqueeze(2))


def hide_pages(
    scores: torch.Tensor,
    pages: Pages,
    start: int,
    stop: int,
    visibility: Visibility,
    queries: slice,
    earlier: bool = True,
) -> None:
    """Set the scores ``[C, B * Hkv, g * q, P]`` of page columns that the queries may not see to ``-inf``.

    Args:
        earlier: whether no token of these pages comes after a query. This is so in attention, since the tokens of the
            queries are packed after it.
    """
    unused = pages.unused(start, stop)
    held = pages.first[:, start:stop][pages.counts[:, start:stop] > 0]
    if earlier and visibility.sees_all(int(held.min()) if held.size else 0):
        if unused is not None:
            scores.masked_fill_(unused.transpose(0, 1).unsqueeze(2), -torch.inf)
        return
    batch, columns = pages.rows // pages.heads, stop - start

    def by_head(x: torch.Tensor) -> torch.Tensor:  # [B * Hkv, C, P] -> [B, Hkv, C * P]
        return x.flatten(1).unflatten(0, (batch, -1))

    bias = visibility.bias(
        by_head(pages.positions(start, stop)), None if unused is None else by_head(unused), pages.heads, queries
    )
    # [B, Hkv, 1 or g, q, C * P] -> [C, B * Hkv, 1 or g, q, P]
    bias = bias.unflatten(-1, (columns, -1)).permute(4, 0, 1, 2, 3, 5).flatten(1, 2)
    scores.unflatten(2, (-1, bias.shape[3])).add_(bias)


def side_buffer(layout: PageLayout, side: str, records: torch.Tensor) -> torch.Tensor:
    """Scratch for one side of ``records [C, rows, record_bytes]`` decoded, float32 ``[C, rows, P, D]``."""
    shape = (*records.shape[:2], layout.page_size, layout.sides[side].dim)
    return scratch(side, shape, torch.float32, records.device)
