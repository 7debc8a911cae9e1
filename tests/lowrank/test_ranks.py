"""How ranks are given out, against every way to give them out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from hf_kvcache.lowrank.basis import LayerBasis, SideBasis
from hf_kvcache.lowrank.ranks import SCORE_WEIGHT, choose_ranks


def side(groups: int, width: int, seed: int, decay: float) -> SideBasis:
    energy = torch.exp(-decay * torch.arange(width)) * (1 + torch.rand(groups, width, generator=_generator(seed)))
    energy = energy.sort(1, descending=True).values
    empty = torch.empty(groups, width, width)
    return SideBasis(empty, empty, energy / energy.sum())


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(seed: int, heads: int = 2, group: int = 1, dim: int = 32, value_dim: int | None = None) -> LayerBasis:
    groups, value_dim = heads // group, value_dim or dim
    decay = (0.02, 0.05, 0.1, 0.3)
    return LayerBasis(
        side(groups, group * dim, 2 * seed, decay[seed % 4]),
        side(groups, group * value_dim, 2 * seed + 1, decay[(seed + 1) % 4]),
        heads,
        score=(0.5 + seed) / SCORE_WEIGHT,
    )


def held(bases: dict[int, LayerBasis], ranks: dict[int, Any]) -> int:
    """Numbers per token."""
    return sum(
        len(getattr(basis, name).down) * getattr(ranks[index], name)
        for index, basis in bases.items()
        for name in ("keys", "values")
    )


def full(bases: dict[int, LayerBasis]) -> int:
    return sum(b.keys.down.shape[0] * b.keys.width + b.values.down.shape[0] * b.values.width for b in bases.values())


def lost(bases: dict[int, LayerBasis], ranks: Any) -> float:
    return sum(
        SCORE_WEIGHT * basis.score * float(basis.keys.energy[:, keys:].sum())
        + float(basis.values.energy[:, values:].sum())
        for basis, (keys, values) in zip(bases.values(), ranks, strict=True)
    )


@pytest.mark.parametrize("ratio", [0.25, 0.3, 0.5, 0.77, 1])
def test_no_other_ranks_lose_less(ratio: float) -> None:
    """Compared with all 4**4 ways to give two layers and two sides 8, 16, 24 or 32 directions."""
    bases = {3: layer(0), 7: layer(2)}
    ranks = choose_ranks(bases, ratio=ratio)
    assert list(ranks) == [3, 7] and held(bases, ranks) <= ratio * full(bases)
    allowed = [
        pairs
        for flat in itertools.product((8, 16, 24, 32), repeat=4)
        for pairs in [(flat[:2], flat[2:])]
        if 2 * sum(flat) <= ratio * full(bases)
    ]
    assert lost(bases, ranks.values()) == pytest.approx(min(lost(bases, pairs) for pairs in allowed), rel=1e-6)


@pytest.mark.parametrize("spread", ["energy", "uniform"])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_ranks_and_budget(group: int, spread: Any) -> None:
    """Ranks are multiples of 8 within the width, not more numbers than asked for, and with energies almost as many."""
    bases = {index: layer(index, heads=4, group=group) for index in range(5)}
    for arguments in ({"rank": 8}, {"rank": 17}, {"rank": 32}, {"ratio": 0.25}, {"ratio": 0.6}, {"ratio": 1.0}):
        ranks = choose_ranks(bases, **arguments, spread=spread)
        numbers = [rank for pair in ranks.values() for rank in pair]
        assert all(rank % 8 == 0 and 8 <= rank <= 32 * group for rank in numbers)
        share = arguments.get("ratio") or arguments["rank"] / 32
        slack = share * full(bases) - held(bases, ranks)
        step = 8 * 4 // group
        assert 0 <= slack < (step if spread == "energy" else 10 * step)
        if spread == "uniform":
            assert set(numbers) == {int(share * 32 * group) // 8 * 8}


def test_a_side_that_needs_more_gets_more() -> None:
    flat, steep = side(2, 32, 0, 0.0), side(2, 32, 1, 0.5)
    even = 1 / SCORE_WEIGHT
    bases = {0: LayerBasis(flat, steep, 2, score=even), 1: LayerBasis(steep, flat, 2, score=even)}
    ranks = choose_ranks(bases, rank=16)
    assert ranks[0].keys > ranks[0].values and ranks[1].values > ranks[1].keys
    assert ranks[0].keys == ranks[1].values


def test_keys_whose_scores_are_large_get_more() -> None:
    """Softmax depends on the errors of scores themselves, not on their share of the scores."""
    same = side(2, 32, 0, 0.1)
    bases = {index: LayerBasis(same, same, 2, score=score) for index, score in enumerate((0.1, 10.0, 1000.0))}
    ranks = choose_ranks(bases, rank=16)
    assert ranks[0].keys < ranks[1].keys < ranks[2].keys


def test_layers_of_different_widths() -> None:
    bases = {0: layer(0, dim=16), 1: layer(1, dim=64, value_dim=40), 2: layer(2, heads=1, dim=24)}
    for spread in ("energy", "uniform"):
        ranks = choose_ranks(bases, ratio=0.5, spread=spread)  # type: ignore[arg-type]
        assert held(bases, ranks) <= 0.5 * full(bases)
    assert choose_ranks(bases, ratio=0.5, spread="uniform") == {0: (8, 8), 1: (32, 16), 2: (8, 8)}
    assert choose_ranks(bases, ratio=1.0) == {0: (16, 16), 1: (64, 40), 2: (24, 24)}


def test_widths_that_are_no_multiple_of_eight_are_rounded_down() -> None:
    bases = {0: layer(0, dim=20)}
    assert choose_ranks(bases, ratio=1.0) == choose_ranks(bases, rank=20, spread="uniform") == {0: (16, 16)}


def test_equal_energies_are_told_apart_by_order() -> None:
    """The outcome is the same every time, and earlier layers go first."""
    even = SideBasis(torch.empty(1, 16, 16), torch.empty(1, 16, 16), torch.full((1, 16), 1 / 16))
    ranks = choose_ranks({index: LayerBasis(even, even, 1, score=1 / SCORE_WEIGHT) for index in range(3)}, rank=12)
    assert ranks == {0: (16, 16), 1: (16, 8), 2: (8, 8)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ["rank=None", "ratio=None", "one of them"]),
        ({"rank": 8, "ratio": 0.5}, ["rank=8", "ratio=0.5"]),
        ({"rank": 33}, ["rank=33", "4", "head dimension, 32"]),
        ({"rank": 3}, ["rank=3", "from 4"]),
        ({"rank": 0}, ["rank=0"]),
        ({"rank": 16.0}, ["rank=16.0", "whole"]),
        ({"rank": True}, ["rank=True"]),
        ({"ratio": 0}, ["ratio=0", "0.125"]),
        ({"ratio": 0.1}, ["ratio=0.1", "0.125 to 1"]),
        ({"ratio": 1.01}, ["ratio=1.01"]),
        ({"ratio": float("nan")}, ["ratio=nan"]),
        ({"ratio": "half"}, ["ratio='half'"]),
        ({"ratio": 0.5, "spread": "even"}, ["spread='even'", "energy", "uniform"]),
    ],
)
def test_bad_values(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        choose_ranks({0: layer(0, group=2), 1: layer(1, group=2)}, **arguments)
    assert all(word in str(error.value) for word in words), error.value
