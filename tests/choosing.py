"""Choosing the cases of a large product that are fast tests; the others are ``slow``."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import pytest

#: Computes the features of a case from its values.
Features = Callable[..., tuple[Hashable, ...]]


def chosen(names: str, *axes: Iterable[Any], fast: Sequence[tuple[Any, ...]]) -> pytest.MarkDecorator:
    """Parametrize over the product of ``axes``; the cases in ``fast`` are fast, all others ``slow``.

    Args:
        names: names of the parameters, as in ``pytest.mark.parametrize``.
        *axes: the values of each parameter.
        fast: cases each of which can fail for a reason that no other case has.
    """
    cases = list(itertools.product(*axes))
    return _marked(names, cases, {cases.index(case) for case in fast})


def pairwise(names: str, *axes: Iterable[Any], of: Features | None = None) -> pytest.MarkDecorator:
    """Parametrize over the product of ``axes``; a few cases are fast, all others ``slow``.

    Most faults show with one value or with a pair of values, and a small part of the product has all pairs. The choice
    depends only on the values, so that it is the same in every process.

    Args:
        names: names of the parameters, as in ``pytest.mark.parametrize``.
        *axes: the values of each parameter.
        of: the features of a case, if not pairs of values but pairs of features have to occur: a feature may be the
            name of a codec, whatever its width. Every single value occurs too.
    """
    cases = list(itertools.product(*axes))
    return _marked(names, cases, covering(cases, of))


def _marked(names: str, cases: list[tuple[Any, ...]], fast: set[int]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        names, [pytest.param(*case, marks=() if i in fast else pytest.mark.slow) for i, case in enumerate(cases)]
    )


def covering(cases: Sequence[tuple[Any, ...]], of: Features | None = None) -> set[int]:
    """Indices of ``cases`` that together have every pair of features and every value that any case has."""
    places: dict[Hashable, int] = {}
    wanted: list[set[int]] = []
    for case in cases:
        values = list(enumerate(case))
        features = values if of is None else list(enumerate(of(*case)))
        marks = [*(("value", at, _name(x)) for at, x in values), *itertools.combinations(_named(features), 2)]
        wanted.append({places.setdefault(mark, len(places)) for mark in marks})
    # The number of pairs that a case adds never grows, so only the best case so far has to be counted again.
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
    """The value and its type, or its text where it has no hash."""
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return (type(value).__name__, value)
