"""Random inputs of prepared choices of pages, and what is right for them, by loops in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from hf_kvcache.kernels.inputs import ChoiceInputs, MassRule, Pages, Sharing
from hf_kvcache.kernels.page import PageLayout, SideFormat
from hf_kvcache.kernels.reference.choose import NO_COLUMN


class Case(NamedTuple):
    """Sizes of a choice.

    ``some`` says whether rows may have fewer pages than others, and lack some. ``sinks`` is the number of them, with
    which heads share their pages; None where each has its own.
    """

    batch: int
    heads: int
    group: int
    dim: int
    columns: int
    spans: int
    count: int
    rule: tuple[float, ...] | MassRule
    some: bool = False
    dtype: torch.dtype = torch.float32
    sinks: int | None = None

    @property
    def width(self) -> int:
        """How many pages a row may have at most."""
        return self.count if self.sinks is None else min(self.columns, 2 * self.count)


CASES = [
    Case(1, 1, 1, 16, 1, 1, 1, (1.0, -1.0)),
    Case(2, 1, 3, 24, 40, 2, 9, (0.3, -0.3), some=True),
    Case(1, 2, 5, 7, 130, 1, 130, (0.0,)),
    Case(1, 3, 4, 128, 65, 4, 64, (0.3, -0.3), dtype=torch.bfloat16),
    Case(3, 2, 6, 33, 64, 1, 1, (0.0,), some=True),
    Case(1, 2, 3, 64, 70, 1, 9, MassRule(0.01, 1.77)),
    Case(2, 1, 5, 24, 40, 2, 9, MassRule(0.01, 1.0), some=True),
    Case(1, 3, 4, 128, 65, 4, 64, MassRule(0.005, 2.5), dtype=torch.bfloat16),
    Case(3, 1, 1, 7, 5, 1, 5, MassRule(0.01, 1.77)),
    Case(1, 3, 3, 64, 70, 1, 9, MassRule(0.01, 1.77), sinks=4),
    Case(2, 3, 2, 24, 40, 2, 9, MassRule(0.01, 1.0), some=True, sinks=3),
    Case(3, 2, 5, 7, 130, 4, 70, MassRule(0.02, 2.5), some=True, dtype=torch.bfloat16, sinks=0),
    Case(2, 1, 4, 128, 33, 1, 16, MassRule(0.005, 1.77, 8), sinks=17),
    Case(1, 2, 3, 24, 40, 2, 9, MassRule(0.02, 1.77, 8), some=True),
    Case(1, 2, 6, 7, 20, 1, 9, MassRule(0.02, 1.77, 7)),
    Case(1, 1, 9, 96, 50, 2, 9, MassRule(0.01, 1.77, 4), dtype=torch.bfloat16),
    Case(1, 8, 1, 16, 6, 1, 1, MassRule(0.02, 1.77), sinks=1),
]


def make(case: Case, seed: int = 0) -> ChoiceInputs:
    """Inputs of which nothing lies side by side that need not, with NaN and noise behind what counts."""
    draw, random = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    rows, width = case.batch * case.heads, _width(case)
    query = torch.randn(case.batch, 1, case.heads * case.group, case.dim, generator=draw).to(case.dtype).transpose(1, 2)
    codes = torch.randint(-127, 128, (rows, (case.columns + 3) * case.spans, width), dtype=torch.int8, generator=draw)
    scales = (torch.rand(rows, (case.columns + 3) * case.spans, generator=draw) + 0.1).half()
    scales[:, case.columns * case.spans :] = torch.nan
    held = case.columns * case.spans
    lengths = random.integers(case.count, case.columns + 1, rows) if case.some else np.full(rows, case.columns)
    shape = rows, case.columns + 5
    there = np.arange(shape[1]) < lengths[:, None]
    addresses = np.where(there, random.integers(1, 1 << 60, shape), 0)
    counts = np.where(there, random.integers(1, 9, shape), 0).astype(np.int32)
    first = random.integers(0, 1 << 40, shape)
    side = SideFormat(case.dim, 8, "dense", dense_dtype=torch.float32)
    of_pages = (x[:, : case.columns] for x in (addresses, counts, first))
    pages = Pages(PageLayout(side, side, 8), [torch.zeros(1, 16, dtype=torch.uint8)], *of_pages, {}, None, case.heads)
    limits = torch.from_numpy(random.integers(1, case.count + 1, rows)) if case.some else None
    missing = torch.from_numpy(~there[:, : case.columns]) if case.some else None
    table = torch.full((3, rows, case.width), -7, dtype=torch.int64)
    chosen = np.full((rows, case.width), -7, dtype=np.int32)
    vectors = codes[:, :held], scales[:, :held]
    sharing = None
    if case.sinks is not None:
        keys = torch.randn(rows, case.sinks, case.dim, generator=draw) * 100
        # Some heads attend to the sinks mostly, others to pages.
        sharing = Sharing(case.count, keys * torch.rand(rows, 1, 1, generator=draw), 8)
    return ChoiceInputs(query, case.rule, *vectors, case.spans, limits, missing, pages, table, chosen, sharing)


def equal_scores(some: bool) -> tuple[Case, ChoiceInputs]:
    """Heads that share pages of which all but one have equal scores; ``some``: rows have limits and lack pages."""
    case = Case(2, 3, 2, 24, 11, 1, 3, MassRule(0.01, 1.77), some=some, sinks=2)
    inputs = make(case)
    inputs.codes.zero_()
    assert inputs.sharing is not None
    inputs.sharing.sinks.zero_()
    inputs.scales.fill_(2)
    inputs.codes[4, 7, 0] = 100
    inputs.query.fill_(1)
    return case, inputs


def _width(case: Case) -> int:
    """Numbers of each part of a page."""
    if isinstance(case.rule, MassRule):
        return case.dim + case.dim // case.rule.band
    return case.dim * len(case.rule)


def expected(case: Case, inputs: ChoiceInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns ``[rows, n]`` that are to be chosen for ``inputs.query``, and their table ``[3, rows, n]``."""
    chosen = _chosen(case, inputs)
    columns = np.full((len(chosen), case.width), NO_COLUMN)
    table = np.zeros((3, *columns.shape), dtype=np.int64)
    for row, best in enumerate(chosen):
        columns[row, : len(best)] = best
        for part, array in enumerate((inputs.pages.addresses, inputs.pages.counts, inputs.pages.first)):
            table[part, row, : len(best)] = array[row, best]
    return torch.from_numpy(columns), torch.from_numpy(table)


def _chosen(case: Case, inputs: ChoiceInputs) -> list[list[int]]:
    """The columns of each row."""
    scores = _scores(case, inputs)
    counts = [case.count] * len(scores) if inputs.limits is None else inputs.limits.tolist()
    if inputs.sharing is None:
        ranked = [np.argsort(-row, kind="stable") for row in scores]
        return [sorted(row[:count].tolist()) for row, count in zip(ranked, counts, strict=True)]
    chosen: list[list[int]] = []
    for first in range(0, len(scores), case.heads):
        found: list[tuple[float, int, int]] = []
        for row in range(first, first + case.heads):
            best = sorted((-score, row, column) for column, score in enumerate(scores[row].tolist()))
            found += best[: 2 * counts[row]]
        taken = sorted(found)[: sum(counts[first : first + case.heads])]
        chosen += [sorted(c for _, r, c in taken if r == row) for row in range(first, first + case.heads)]
    return chosen


def _scores(case: Case, inputs: ChoiceInputs) -> np.ndarray:
    """Scores ``[rows, columns]``, ``-inf`` where a row has no page."""
    rows = inputs.pages.rows
    query = inputs.query.double().numpy().reshape(rows, case.group, case.dim)
    scores = np.empty((rows, case.columns))
    for row in range(rows):
        vectors = inputs.codes[row].double().numpy() * inputs.scales[row].double().numpy()[:, None]
        pages = vectors[: case.columns * case.spans].reshape(case.columns, case.spans, -1)
        absent = np.zeros(case.columns, dtype=bool) if inputs.missing is None else inputs.missing[row].numpy()
        if isinstance(case.rule, MassRule):
            known = np.zeros(case.group)
            if inputs.sharing is not None:  # pages count all their tokens, sinks are one each
                keys = inputs.sharing.sinks[row].double().numpy()
                known = np.exp(query[row] @ keys.T * case.rule.scaling).sum(1) / inputs.sharing.tokens
            scores[row] = _probabilities(case.rule, query[row], pages, absent, known)
        else:
            scores[row] = _largest_products(case.rule, query[row], pages)
        scores[row, absent] = -np.inf
    return scores


def _largest_products(weights: tuple[float, ...], query: np.ndarray, pages: np.ndarray) -> np.ndarray:
    """Scores ``[columns]`` of ``pages [columns, spans, W]`` for ``query [g, D]``."""
    scores = np.full(len(pages), -np.inf)
    for column, parts in enumerate(pages):
        for part in parts:
            products = [
                one @ vector + weight * (np.abs(one) @ vector)
                for one in query
                for weight, vector in zip(weights, np.split(part, len(weights)), strict=True)
            ]
            scores[column] = max(scores[column], sum(products))
    return scores


def _probabilities(
    rule: MassRule, query: np.ndarray, pages: np.ndarray, absent: np.ndarray, known: np.ndarray
) -> np.ndarray:
    """As :func:`_largest_products`, by the attention that is expected, where a row has no pages at ``absent``.

    ``known [g]`` is what queries pay elsewhere.
    """
    total = np.zeros(len(pages))
    for one, elsewhere in zip(query, known, strict=True):
        masses = np.zeros(len(pages))
        for column, parts in enumerate(pages):
            for part in parts:
                mean, deviations = part[: len(one)], part[len(one) :]
                m = one @ mean * rule.scaling
                bands = one.reshape(len(deviations), -1)
                s = np.sqrt(sum((band**2).mean() * d**2 for band, d in zip(bands, deviations, strict=True)))
                s *= rule.scaling
                masses[column] += np.exp(m + (s**2 / 2 if s < rule.reach else rule.reach * (s - rule.reach / 2)))
        masses[absent] = 0
        total += masses / (masses.sum() + elsewhere)
    return total
