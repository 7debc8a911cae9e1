"""Sparse reading written once more, as loops over tokens in float64, from what the package says of it in its docs."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch

from hf_kvcache.layers.sparse import SparseReads
from hf_kvcache.sparse.picked import PickedPages


def pages_of(layer: SparseReads, row: int) -> list[list[int]]:
    """The positions of the tokens in each page of a sequence; the same for all heads."""
    storage = layer.storage
    if storage is None:
        return []
    table_row = np.array([row * storage.heads])
    counts = storage.table.counts(table_row, storage.table.columns)[0]
    positions = storage.table.positions(0, storage.table.columns, storage.page_size, table_row)[0]
    return [at[:count].tolist() for at, count in zip(positions, counts, strict=True) if count]


def pages_allowed(amount: int | float, pages: list[list[int]], sinks: int, tail: int, page: int) -> int:
    """How many of its ``pages`` a sequence may read."""
    always, packed = sinks + tail, sum(len(one) for one in pages)
    most = amount * (always + packed) if isinstance(amount, float) else amount
    return min(len(pages), max(1, int((most - always) // page)))


def rounded_outward(low: np.ndarray, high: np.ndarray, off: float) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of one page in 8 bits with one scale in half precision, moved outward by ``off`` steps beforehand."""
    largest = max(np.abs(low).max(), np.abs(high).max(), 2.0**-7)
    scale = float(np.float16(np.float32(largest) / np.float32(126.5)))
    return np.floor(low / scale - off) * scale, np.ceil(high / scale + off) * scale


def page_scores(
    keys: np.ndarray, query: np.ndarray, spans: list[list[int]], weight: float = 0.3
) -> tuple[np.ndarray, np.ndarray]:
    """Quest's score of each page, as little and as much as it may be.

    The two differ where a bound lies on a step but for the rounding of fp32: a step further out is as right.

    Args:
        keys: ``[T, D]`` of one KV head.
        query: ``[g, D]`` of its query heads.
        spans: the tokens of each page.
        weight: of the distance of the bounds.
    """
    least, most = [], []
    for span in spans:
        edges = [rounded_outward(keys[span].min(0), keys[span].max(0), off) for off in (-1e-4, 1e-4)]
        ways = []
        for low, high in product(*zip(*edges, strict=True)):
            middle, half = (low + high) / 2, weight * (high - low) / 2
            nearer = [(m - h, m + h) for m, h in zip(middle, half, strict=True)]
            ways.append([max(q * a, q * b) for one in query for q, (a, b) in zip(one, nearer, strict=True)])
        least.append(np.min(ways, 0).sum())
        most.append(np.max(ways, 0).sum())
    return np.array(least), np.array(most)


def page_masses(
    keys: np.ndarray, query: np.ndarray, spans: list[list[int]], page: int
) -> tuple[np.ndarray, np.ndarray]:
    """The logarithm of the score that moments give each page, twice; arguments as those of :func:`page_scores`.

    Of a page that is not full, the first ``page // 2`` tokens are the first half.
    """
    logs = _expected_logs(keys, query, spans, page)
    masses = np.exp(logs - logs.max(1, keepdims=True, initial=-np.inf))
    scores = np.log((masses / masses.sum(1, keepdims=True)).sum(0))
    return scores, scores


def chosen_across_heads(
    keys: np.ndarray, query: np.ndarray, spans: list[list[int]], sinks: list[int], page: int, allowed: int
) -> list[list[int]]:
    """The pages of each KV head that moments choose where the heads share what they may read.

    Args:
        keys: ``[Hkv, T, D]``.
        query: ``[Hkv, g, D]``.
        spans: the tokens of each page.
        sinks: tokens.
        page: tokens that a page counts as.
        allowed: pages of a head, if each had its own.
    """
    found = []
    for head, (own, asked) in enumerate(zip(keys, query, strict=True)):
        pages = np.exp(_expected_logs(own, asked, spans, page)) * page
        known = np.exp(asked @ own[sinks].T / np.sqrt(own.shape[1]))
        score = (pages / (pages.sum(1, keepdims=True) + known.sum(1, keepdims=True))).sum(0)
        best = np.argsort(-score)[: 2 * allowed]
        found += [(-score[column], head, int(column)) for column in best]
    taken = sorted(found)[: allowed * len(keys)]
    return [sorted(column for _, other, column in taken if other == head) for head in range(len(keys))]


def _expected_logs(keys: np.ndarray, query: np.ndarray, spans: list[list[int]], page: int) -> np.ndarray:
    """The logarithm of the mean of the exponentials of the scores that queries may expect in pages.

    Both halves of a page have a mean, and a deviation for every 8 elements. A half without tokens has those of the
    first half.
    """
    logs = np.empty((len(query), len(spans)))
    for column, span in enumerate(spans):
        first, second = span[: page // 2], span[page // 2 :]
        halves = [_moments(keys[half]) for half in (first, second or first)]
        for head, one in enumerate(query / np.sqrt(keys.shape[1])):
            exponentials = []
            for mean, deviations in halves:
                bands = np.split(one, len(deviations))
                s = np.sqrt(sum(d**2 * (band**2).mean() for band, d in zip(bands, deviations, strict=True)))
                exponentials.append(np.exp(one @ mean + (s**2 / 2 if s < 1.77 else 1.77 * s - 1.77**2 / 2)))
            logs[head, column] = np.log(np.mean(exponentials))
    return logs


def _moments(keys: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Mean ``[D]`` of keys ``[n, D]``, and the root of the summed variances of every 8 elements, rounded to 8 bits."""
    mean = keys.mean(0)
    variance = ((keys - mean) ** 2).mean(0)
    band = next(n for n in (8, 4, 2, 1) if len(mean) % n == 0)
    deviations = [float(np.sqrt(variance[i : i + band].sum())) for i in range(0, len(mean), band)]
    largest = max(np.abs(mean).max(), *deviations, 2.0**-7)
    scale = float(np.float16(np.float32(largest) / np.float32(126.5)))
    return np.round(mean / scale) * scale, [float(np.round(d / scale) * scale) for d in deviations]


def attention(query: np.ndarray, keys: np.ndarray, values: np.ndarray, seen: list[int]) -> np.ndarray:
    """Attention ``[Dv]`` of one query over the tokens ``seen``."""
    scores = keys[seen] @ query / np.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    return weights @ values[seen] / weights.sum()


def chosen(layer: SparseReads) -> Any:
    """The columns that the latest step of ``layer`` read, a list for each row; None if it read everything."""
    read = layer.latest_read
    assert read is not None and layer.storage is not None
    reader = layer.reader(layer.storage)
    if not isinstance(read.pages, PickedPages) or reader.columns is None:
        return None
    columns = read.pages.columns
    counted = torch.as_tensor(read.pages.counts)
    return [
        [int(c) for c, n in zip(row, count, strict=True) if n]
        for row, count in zip(reader.columns[:, :columns].tolist(), counted.tolist(), strict=True)
    ]
