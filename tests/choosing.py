"""Which cases of a large product are fast tests; the others are ``slow``."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import pytest

#: A case has some features; by default its own values.
Features = Callable[..., tuple[Hashable, ...]]


def chosen(names: str, *axes: Iterable[Any], fast: Sequence[tuple[Any, ...]]) -> pytest.MarkDecorator:
    """Parametrize over the product of ``axes``, of which the cases ``fast`` are fast and all others ``slow``.

    Args:
        names: of the parameters, as in ``pytest.mark.parametrize``.
        *axes: their values.
        fast: cases that can each fail for a reason of their own.
    """
    cases = list(itertools.product(*axes))
    return _marked(names, cases, {cases.index(case) for case in fast})


def pairwise(names: str, *axes: Iterable[Any], of: Features | None = None) -> pytest.MarkDecorator:
    """Parametrize over the product of ``axes``, of which few cases are fast and all others ``slow``.

    Most faults show with one value, or with two that meet; all pairs meet in a small part of the product. The choice
    depends on the values only: it is the same in every process.

    Args:
        names: of the parameters, as in ``pytest.mark.parametrize``.
        *axes: their values.
        of: the features of a case, whose pairs are to occur, where those are coarser than its values: a codec's name
            for each of its widths, say. Single values occur in any case.
    """
    cases = list(itertools.product(*axes))
    return _marked(names, cases, covering(cases, of))


def _marked(names: str, cases: list[tuple[Any, ...]], fast: set[int]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        names, [pytest.param(*case, marks=() if i in fast else pytest.mark.slow) for i, case in enumerate(cases)]
    )


def covering(cases: Sequence[tuple[Any, ...]], of: Features | None = None) -> set[int]:
    """Which of ``cases`` to take so that every pair of features that some case has, and every value, occurs."""
    places: dict[Hashable, int] = {}
    wanted: list[set[int]] = []
    for case in cases:
        values = list(enumerate(case))
        features = values if of is None else list(enumerate(of(*case)))
        marks = [*(("value", at, _name(x)) for at, x in values), *itertools.combinations(_named(features), 2)]
        wanted.append({places.setdefault(mark, len(places)) for mark in marks})
    # What a case adds never grows, so that only the one that seems best has to be counted again.
    missing, taken = set(range(len(places))), set()
    waiting = [(-len(marks), index) for index, marks in enumerate(wanted)]
    heapq.heapify(waiting)
    while missing:
        _, index = heapq.heappop(waiting)
        adds = len(wanted[index] & missing)
        if waiting and -adds > waiting[0][0]:
            heapq.heappush(waiting, (-adds, index))
        else:
            taken.add(index)
            missing -= wanted[index]
    return taken


def _named(features: Iterable[tuple[int, Any]]) -> list[tuple[int, Hashable]]:
    return [(at, _name(x)) for at, x in features]


def _name(value: Any) -> Hashable:
    """The value, or its text where it has no hash."""
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return (type(value).__name__, value)
