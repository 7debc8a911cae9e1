"""The probability of each key, summed over the queries, in plain torch: the definition for every backend."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hf_kvcache.kernels.inputs import DenseTokens, Pages, Scoring
from hf_kvcache.kernels.reference.decode import add_bias, hide_pages
from hf_kvcache.kernels.reference.hadamard import rotate
from hf_kvcache.kernels.reference.levels import SideDecoder, decode_side, page_scores
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.kernels.workspace import scratch


class Tile(NamedTuple):
    """The amount that is computed at a time.

    Attributes:
        keys: keys of each row.
        queries: query tokens, at least.
        scores: scores, unless that would make fewer queries.
    """

    keys: int
    queries: int
    scores: int


#: On a CPU, so many scores that they stay in the cache of a core; elsewhere, enough of them to fill the device.
TILES = {"cpu": Tile(256, 32, 1 << 18), "other": Tile(2048, 128, 1 << 24)}


def column_sums(
    query: torch.Tensor,
    log_sum_exp: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    decode: SideDecoder = decode_side,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Probability of each key, summed over the queries (H2O, arXiv:2306.14048; SnapKV, arXiv:2404.14469).

    The sum over the queries of ``exp(score - log_sum_exp)`` is computed tile by tile, so that no matrix of queries
    times keys is ever held. For an observation window, pass its queries alone, with ``visibility.start`` at the first.

    Args:
        query: ``[B, Hq, q, Dk]``, in the model's basis.
        log_sum_exp: float32 ``[B, Hq, q]``, from the attention of these queries, sink logits included.
        pages: the packed tokens, or None.
        dense: the full-precision tokens; their values are not read.
        visibility: what the queries may see.
        scoring: how scores are made; its sink logits are not read.
        decode: decodes the keys of pages.

    Returns:
        Float32 ``[B, Hq, columns * P]`` of the pages (None without pages) and ``[B, Hq, n]`` of the full-precision
        tokens; 0 where there is no token.
    """
    batch, query_heads, length, _ = query.shape
    heads = dense.keys.shape[1]
    rows = query.float().reshape(batch * heads, -1, length, query.shape[-1]) * scoring.inner
    # A query that sees nothing has scores of -inf only, and -inf - -inf is not a number.
    shift = log_sum_exp.masked_fill(log_sum_exp == -torch.inf, 0.0).reshape(*rows.shape[:3], 1)
    page_sums = None
    if pages is not None:
        page_sums = _page_sums(rows, shift, pages, visibility, scoring, decode).view(batch, query_heads, -1)
    return page_sums, _dense_sums(rows, shift, dense, visibility, scoring).view(batch, query_heads, -1)


def _dense_sums(
    rows: torch.Tensor, shift: torch.Tensor, dense: DenseTokens, visibility: Visibility, scoring: Scoring
) -> torch.Tensor:
    """``[B * Hkv, g, n]`` from queries ``[B * Hkv, g, q, D]`` and the shift of their scores ``[B * Hkv, g, q, 1]``."""
    batch, heads, slots, _ = dense.keys.shape
    sums, tile = torch.zeros(*rows.shape[:2], slots, dtype=torch.float32, device=rows.device), _tile(rows)
    for start in range(0, slots, tile.keys):
        part = slice(start, min(start + tile.keys, slots))
        keys = dense.keys[:, :, part].float().flatten(0, 1).transpose(1, 2)
        extent = _extent(dense, part)
        for queries in _blocks(rows, keys.shape[-1]):
            if not _some_seen(extent, visibility, queries):
                continue
            scores = torch.bmm(rows[:, :, queries].flatten(1, 2), keys).unflatten(1, (rows.shape[1], -1))
            if scoring.softcap is not None:
                scores = scores.tanh_().mul_(scoring.softcap)
            _hide(scores.unflatten(0, (batch, heads)), dense, part, visibility, queries)
            sums[:, :, part] += scores.sub_(shift[:, :, queries]).exp_().sum(2)
    return sums


def _page_sums(
    rows: torch.Tensor,
    shift: torch.Tensor,
    pages: Pages,
    visibility: Visibility,
    scoring: Scoring,
    decode: SideDecoder,
) -> torch.Tensor:
    """``[B * Hkv, g, columns * P]``, as :func:`_dense_sums`."""
    layout = pages.layout
    keys = layout.sides["keys"]
    rotated = rotate(pages.scale_queries(rows), keys)
    sums = torch.zeros(*rows.shape[:2], pages.columns, layout.page_size, dtype=torch.float32, device=rows.device)
    step = max(1, _tile(rows).keys // layout.page_size)
    for start in range(0, pages.columns, step):
        stop = min(start + step, pages.columns)
        records = pages.records(start, stop)
        shape = (stop - start, len(rows), layout.page_size, keys.dim)
        buffer = scratch("keys", shape, torch.float32, rows.device)
        last = _last_position(pages, start, stop)
        for queries in _blocks(rows, step * layout.page_size):
            block = rotated[:, :, queries].flatten(1, 2)
            scores = page_scores(layout, records, block, buffer, decode)
            if pages.key_mean is not None:
                scores += block @ pages.key_mean.unsqueeze(-1)
            if scoring.softcap is not None:
                scores = scores.tanh_().mul_(scoring.softcap)
            add_bias(scores, layout, records)
            earlier = last <= visibility.start + queries.start
            hide_pages(scores, pages, start, stop, visibility, queries, earlier)
            probabilities = scores.sub_(shift[:, :, queries].flatten(1, 2)).exp_()
            sums[:, :, start:stop] += probabilities.unflatten(2, (rows.shape[1], -1)).sum(3).permute(1, 2, 0, 3)
    return sums


def _tile(rows: torch.Tensor) -> Tile:
    return TILES["cpu" if rows.device.type == "cpu" else "other"]


def _blocks(rows: torch.Tensor, keys: int) -> list[slice]:
    """The queries of ``rows [B * Hkv, g, q, D]`` in blocks, small enough for the scores of ``keys`` keys to be few."""
    length, tile = rows.shape[2], _tile(rows)
    block = max(tile.queries, tile.scores // (rows.shape[0] * rows.shape[1] * keys))
    return [slice(start, min(start + block, length)) for start in range(0, length, block)]


def _extent(dense: DenseTokens, part: slice) -> tuple[int, int] | None:
    """The first and the last position of the slots ``part``; None without positions."""
    if dense.positions is None:
        return None
    positions = dense.positions[:, part]
    return int(positions.min()), int(positions.max())


def _some_seen(extent: tuple[int, int] | None, visibility: Visibility, queries: slice) -> bool:
    """Whether any of the queries sees anything of a tile, by positions and window."""
    if extent is None:
        return True
    if visibility.causal and extent[0] > visibility.start + queries.stop - 1:
        return False
    return visibility.window is None or extent[1] > visibility.start + queries.start - visibility.window


def _hide(scores: torch.Tensor, dense: DenseTokens, part: slice, visibility: Visibility, queries: slice) -> None:
    """Set the scores ``[B, Hkv, g, q, n]`` of the slots ``part`` to ``-inf`` where a query does not see them."""
    unused = None if dense.unused is None else dense.unused[:, None, part]
    if dense.positions is not None:
        scores.add_(visibility.bias(dense.positions[:, None, part], unused, scores.shape[1], queries))
    elif unused is not None:
        scores.masked_fill_(unused[:, :, None, None], -torch.inf)


def _last_position(pages: Pages, start: int, stop: int) -> int:
    """The last position in page columns ``[start, stop)``; -1 without tokens.

    Attention runs before the tokens of its queries are packed. Column sums may run later, and find them in pages.
    """
    positions, unused = pages.positions(start, stop), pages.unused(start, stop)
    used = positions if unused is None else positions[~unused]
    return int(used.max()) if used.numel() else -1
