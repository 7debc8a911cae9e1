"""From scores to kept tokens, against the definition written with sorted lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_kvcache.eviction.selection import choose

HEADS, TOKENS = 3, 12
#: Few different scores, so that there are ties.
SCORES = st.sampled_from([-2.0, 0.0, 0.5, 1.0, float("nan"), float("inf"), -float("inf")])
_LEAST = torch.finfo(torch.float32).max


def _matrix(of: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(st.lists(of, min_size=TOKENS, max_size=TOKENS), min_size=HEADS, max_size=HEADS)


def _rank(score: float) -> float:
    """NaN is the lowest score, and no number is beyond those of float32."""
    return -_LEAST if score != score else min(max(score, -_LEAST), _LEAST)


def by_lists(
    scores: list[list[float]], protected: list[list[bool]], held: list[int], quota: int, floor: float | None
) -> list[list[bool]]:
    """The definition, for one sequence; head ``h`` holds its first ``held[h]`` tokens."""
    kept = [{t for t in range(held[h]) if protected[h][t]} for h in range(HEADS)]

    def best(candidates: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return sorted(candidates, key=lambda ht: (_rank(scores[ht[0]][ht[1]]), ht[1], ht[0]), reverse=True)

    def others(h: int) -> list[tuple[int, int]]:
        return best([(h, t) for t in range(held[h]) if t not in kept[h]])

    for h in range(HEADS):
        sure = quota if floor is None else int(quota * floor)
        kept[h] |= {t for _, t in others(h)[: max(0, sure - len(kept[h]))]}
    if floor is not None:
        left = max(0, quota * HEADS - sum(map(len, kept)))
        for head, t in best([pair for h in range(HEADS) for pair in others(h)])[:left]:
            kept[head].add(t)
    return [[t in kept[h] for t in range(TOKENS)] for h in range(HEADS)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    scores=_matrix(SCORES),
    protected=_matrix(st.sampled_from([True, False, False, False])),
    held=st.lists(st.integers(0, TOKENS), min_size=HEADS, max_size=HEADS),
    quota=st.integers(0, TOKENS + 2),
    floor=st.sampled_from([None, 0.0, 0.2, 0.5, 1.0]),
)
def test_against_lists(
    scores: list[list[float]], protected: list[list[bool]], held: list[int], quota: int, floor: float | None
) -> None:
    """Every shape of ties, protected tokens, missing tokens and floors."""
    exists = torch.arange(TOKENS) < torch.tensor(held)[None, :, None]
    guarded = torch.tensor(protected)[None] & exists
    ours = choose(torch.tensor(scores)[None], guarded, exists, quota, floor)
    assert ours[0].tolist() == by_lists(scores, protected, held, quota, floor)
    if all(count == TOKENS for count in held):
        assert torch.equal(ours, choose(torch.tensor(scores)[None], guarded, None, quota, floor))


def test_ties_go_to_the_newer() -> None:
    none = torch.zeros(1, 2, 6, dtype=torch.bool)
    assert choose(torch.zeros(1, 2, 6), none, None, 2)[0].tolist() == [[False] * 4 + [True] * 2] * 2


@pytest.mark.parametrize("floor", [None, 0.2])
def test_rows_do_not_compete(floor: float | None) -> None:
    """What one sequence keeps does not depend on what stands beside it."""
    scores = torch.randn(4, HEADS, TOKENS, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(scores.shape, dtype=torch.bool)
    whole = choose(scores, none, None, 5, floor)
    for row in range(4):
        one = slice(row, row + 1)
        assert torch.equal(whole[one], choose(scores[one], none[one], None, 5, floor))


def test_protected_beyond_the_quota_all_stay() -> None:
    protected = torch.zeros(1, 2, 8, dtype=torch.bool)
    protected[0, 0, :5] = True
    for floor in (None, 0.2):
        kept = choose(torch.randn(1, 2, 8), protected, None, 3, floor)
        assert kept[0, 0, :5].all()
    assert choose(torch.randn(1, 2, 8), protected, None, 3).sum(-1).tolist() == [[5, 3]]


def test_whole_numbers_and_half_precision_are_scores_too() -> None:
    none = torch.zeros(1, 1, 5, dtype=torch.bool)
    for scores in (torch.tensor([[[3, 1, 2, 5, 4]]]), torch.tensor([[[3, 1, 2, 5, 4]]]).half()):
        assert choose(scores, none, None, 2)[0, 0].tolist() == [False, False, False, True, True]
