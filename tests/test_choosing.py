"""The choice of fast cases: every pair of values occurs, and the choice is always the same."""

from __future__ import annotations

import itertools

from tests.choosing import chosen, covering, pairwise

AXES = (["a", "b", "c", "d"], [1, 2, 3], [True, False], [None, {"x": 1}, {"x": 2}])


def test_every_pair_of_values_occurs_in_few_cases() -> None:
    cases = list(itertools.product(*AXES))
    taken = [cases[i] for i in covering(cases)]
    for (i, one), (j, other) in itertools.combinations(enumerate(AXES), 2):
        for a, b in itertools.product(one, other):
            assert any(case[i] == a and type(case[i]) is type(a) and case[j] == b for case in taken), (a, b)
    assert len(taken) <= 16 < len(cases)  # all pairs of the two longest axes need 4 times 3
    assert covering(cases) == covering(list(cases))


def test_features_may_be_coarser_than_values() -> None:
    """Each spec occurs, and each name, but not each spec, occurs with every kind."""
    specs, kinds = [f"{name}{bits}" for name in "abc" for bits in range(4)], list("uvwx")
    cases = list(itertools.product(specs, kinds))
    taken = [cases[i] for i in covering(cases, lambda spec, kind: (spec[0], kind))]
    assert {spec for spec, _ in taken} == set(specs)
    assert {(spec[0], kind) for spec, kind in taken} == set(itertools.product("abc", kinds))
    assert len(taken) == 12


def test_all_cases_are_kept_and_chosen_ones_are_fast() -> None:
    params = pairwise("a, b, c, d", *AXES).args[1]
    assert [param.values for param in params] == list(itertools.product(*AXES))
    assert 0 < sum(not param.marks for param in params) < len(params) // 2
    params = chosen("a, b", "xy", [1, 2], fast=[("x", 2), ("y", 1)]).args[1]
    assert [bool(param.marks) for param in params] == [True, False, False, True]
