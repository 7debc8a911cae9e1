"""Attention over a layer's storage: pages in their rotated basis, dense tokens in the model's, then both merged."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from hf_kvcache.codecs.pages import rotate
from hf_kvcache.kernels.decode.reference import (
    OnlineSoftmax,
    decode_side,
    dense_attention,
    merge,
    page_output,
    page_scores,
)
from hf_kvcache.kernels.workspace import scratch
from hf_kvcache.masks import Visibility
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.chunks import CHUNK_TOKENS, PageChunk

#: Scores computed at a time; a longer block of queries is cut.
_SCORE_ELEMENTS = 1 << 24


@dataclass
class DenseTokens:
    """Full-precision tokens that take part in one attention call.

    Attributes:
        keys: ``[B, Hkv, n, Dk]``.
        values: ``[B, Hkv, n, Dv]``.
        positions: int64 ``[B, 1, n]``; None if every query sees every token.
        unused: bool ``[B, 1, n]``, True where there is no token; None if all are tokens.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor | None
    unused: torch.Tensor | None


@dataclass
class Scoring:
    """How scores are made: ``softcap * tanh(q . k * scaling / softcap)``, and logits that only take probability away.

    Attributes:
        scaling: factor of the dot products.
        softcap: logit soft-capping (Gemma 2), or None.
        sink_logits: a learned logit per query head ``[Hq]`` in the softmax's denominator (gpt-oss), or None.
    """

    scaling: float
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None


def attend(
    storage: PagedStorage,
    query: torch.Tensor,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    columns: int | None = None,
) -> torch.Tensor:
    """Attention of new queries over everything a storage holds.

    Args:
        storage: the layer's tokens.
        query: ``[B, Hq, q, Dk]``.
        dense: the full-precision tokens, the queries' own among them.
        visibility: what the queries may see.
        scoring: how scores are made.
        columns: read only the first so many page columns.

    Returns:
        ``[B, q, Hq, Dv]`` in the dtype of the query.
    """
    batch, query_heads, length, _ = query.shape
    chunks = storage.chunks(columns) if storage.table.columns and columns != 0 else []
    block = max(1, _SCORE_ELEMENTS // (batch * query_heads * max(dense.keys.shape[2], CHUNK_TOKENS)))
    if length <= block:
        return _attend_block(storage, query, dense, visibility, scoring, chunks, slice(0, length))
    outputs = []
    for start in range(0, length, block):
        queries = slice(start, min(start + block, length))
        seen = dense.keys.shape[2] - (length - queries.stop) if visibility.causal else dense.keys.shape[2]
        part = replace(
            dense,
            keys=dense.keys[:, :, :seen],
            values=dense.values[:, :, :seen],
            positions=None if dense.positions is None else dense.positions[..., :seen],
            unused=None if dense.unused is None else dense.unused[..., :seen],
        )
        outputs.append(_attend_block(storage, query[:, :, queries], part, visibility, scoring, chunks, queries))
    return torch.cat(outputs, 1)


def _attend_block(
    storage: PagedStorage,
    query: torch.Tensor,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    chunks: list[PageChunk],
    queries: slice,
) -> torch.Tensor:
    batch, query_heads, length, _ = query.shape
    heads = storage.heads
    # All the queries that read the same KV head are one matrix: [B * Hkv, g * q, Dk].
    rows = query.float().reshape(batch * heads, -1, query.shape[-1]) * _inner_scale(scoring)
    bias = None
    if dense.positions is not None:
        bias = visibility.bias(dense.positions, dense.unused, heads, queries)
    result = dense_attention(rows, dense.keys, dense.values, bias, scoring.softcap)
    if chunks:
        result = merge(result, _attend_pages(storage, rows, chunks, visibility, scoring, queries))
    output, log_sum_exp = result
    if scoring.sink_logits is not None:
        sinks = scoring.sink_logits.float().reshape(1, heads, -1, 1).expand(batch, -1, -1, length)
        output = output * torch.sigmoid(log_sum_exp - sinks.reshape(log_sum_exp.shape)).unsqueeze(-1)
    output = output.to(query.dtype).view(batch, query_heads, length, -1)
    return output.transpose(1, 2).contiguous()


def _inner_scale(scoring: Scoring) -> float:
    """The factor of the query: with soft-capping, the capped scores are ``softcap * tanh`` of these."""
    return scoring.scaling if scoring.softcap is None else scoring.scaling / scoring.softcap


def _attend_pages(
    storage: PagedStorage,
    rows: torch.Tensor,
    chunks: list[PageChunk],
    visibility: Visibility,
    scoring: Scoring,
    queries: slice,
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = storage.layout
    keys_format, values_format = layout.sides["keys"], layout.sides["values"]
    count, queries_per_row, _ = rows.shape
    rotated = rotate(rows, keys_format)
    # The mean that was taken out of the packed keys shifts all their scores of a query alike.
    shift = None if storage.center is None else rotated @ storage.center.flatten(0, 1).unsqueeze(-1)
    state = OnlineSoftmax(count, queries_per_row, values_format.dim, rows.device)
    for chunk in chunks:
        records = chunk.reader.records().view(chunk.columns, count, -1)
        shape = (chunk.columns, count, storage.page_size)
        scores = page_scores(layout, records, rotated, _buffer("keys", (*shape, keys_format.dim), rows.device))
        if shift is not None:
            scores += shift
        if scoring.softcap is not None:
            scores = scores.tanh_().mul_(scoring.softcap)
        _hide(scores, chunk, visibility, storage, queries)
        buffer = _buffer("values", (*shape, values_format.dim), rows.device)
        state.add(page_output(layout, records, state.weigh(scores), buffer))
    output, log_sum_exp = state.result()
    return rotate(output, values_format, inverse=True), log_sum_exp


def _hide(
    scores: torch.Tensor, chunk: PageChunk, visibility: Visibility, storage: PagedStorage, queries: slice
) -> None:
    """Set the scores ``[C, B * Hkv, g * q, P]`` that the queries may not see to ``-inf``."""
    if visibility.sees_all(chunk.first_position):
        if chunk.unused is not None:
            scores.masked_fill_(chunk.unused.unsqueeze(2), -torch.inf)
        return
    columns, page_size = chunk.columns, storage.page_size

    def by_head(x: torch.Tensor) -> torch.Tensor:  # [C, B * Hkv, P] -> [B, Hkv, C * P]
        return x.unflatten(1, (storage.batch, -1)).permute(1, 2, 0, 3).flatten(2)

    unused = None if chunk.unused is None else by_head(chunk.unused)
    bias = visibility.bias(by_head(chunk.positions(scores.device)), unused, storage.heads, queries)
    # [B, Hkv, 1 or g, q, C * P] -> [C, B * Hkv, 1 or g, q, P]
    bias = bias.unflatten(-1, (columns, page_size)).permute(4, 0, 1, 2, 3, 5).flatten(1, 2)
    scores.unflatten(2, (-1, bias.shape[3])).add_(bias)


def _buffer(side: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return scratch(side, shape, torch.float32, device)


def dense_side(storage: PagedStorage, side: str, start: int, length: int) -> torch.Tensor:
    """All keys or all values at positions ``start ... start + length - 1`` as a dense tensor.

    Returns:
        ``[B, Hkv, length, D]`` in the model's basis and dtype, zeros where a token is not held.
    """
    fmt = storage.layout.sides[side]
    rows = storage.batch * storage.heads
    # One more place, into which everything goes that is no token or not asked for.
    out = torch.zeros(rows, length + 1, fmt.dim, dtype=storage.dtype, device=storage.device)

    def place(tokens: torch.Tensor, positions: torch.Tensor, unused: torch.Tensor | None) -> None:
        index = positions - start
        elsewhere = (index < 0) | (index >= length)
        index = index.masked_fill(elsewhere if unused is None else elsewhere | unused, length)
        out.scatter_(1, index.unsqueeze(-1).expand(-1, -1, fmt.dim), tokens.to(out.dtype))

    for chunk in storage.chunks(storage.table.columns - storage.ahead):
        records = chunk.reader.records().view(chunk.columns, rows, -1)
        decoded = decode_side(
            storage.layout, side, records, _buffer(side, (chunk.columns, rows, storage.page_size, fmt.dim), out.device)
        )
        if side == "keys" and storage.center is not None:
            decoded = decoded + storage.center.flatten(0, 1).unsqueeze(1)
        tokens = rotate(decoded, fmt, inverse=True).transpose(0, 1).flatten(1, 2)
        unused = None if chunk.unused is None else chunk.unused.transpose(0, 1).flatten(1)
        place(tokens, chunk.positions(out.device).transpose(0, 1).flatten(1), unused)
    dense, held = storage.dense, storage.dense.longest
    if held:
        positions = torch.from_numpy(dense.positions[:, :held]).to(out.device).repeat_interleave(storage.heads, 0)
        used = np.arange(held) < dense.lengths[:, None]
        unused = torch.from_numpy(~used).to(out.device).repeat_interleave(storage.heads, 0)
        place(getattr(dense, side)[:, :, :held].flatten(0, 1), positions, unused)
    return out.view(storage.batch, storage.heads, length + 1, fmt.dim)[:, :, :length]
