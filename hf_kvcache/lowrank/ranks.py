"""How many directions each layer keeps of its keys and of its values."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

from hf_kvcache.lowrank.basis import LayerBasis, SideBasis
from hf_kvcache.utils.validation import one_of

Spread = Literal["energy", "uniform"]

#: Ranks are multiples of this: codes of any number of bits then fill whole bytes.
STEP = 8

#: Weight of the squared error of a score, beside the squared error of a value as a share of its square. Measured: at
#: half of the width, SmolLM2's predictions have the least KL divergence at about this weight.
SCORE_WEIGHT = 0.3


class LayerRanks(NamedTuple):
    """Ranks of a layer's keys and values."""

    keys: int
    values: int


def choose_ranks(
    bases: Mapping[int, LayerBasis], rank: int | None = None, ratio: float | None = None, spread: Spread = "energy"
) -> dict[int, LayerRanks]:
    """Ranks of all layers, multiples of 8 from 8 up to the width, which together are no more than was asked for.

    Args:
        bases: by index of the layer.
        rank: coefficients per token, KV head and side, on average.
        ratio: the same as a share of the full width.
        spread: ``"uniform"`` gives every layer and side the same share. ``"energy"`` gives out 8 directions at a time,
            to the side where they save the most error per number stored. The error is the values' squared error as a
            share of their squares, and the scores' squared error times :data:`SCORE_WEIGHT`.

    Raises:
        ValueError: unless there is either a rank or a ratio, within its range, or for another spread.
    """
    one_of("spread", spread, get_args(Spread))
    sides = [_Side(index, name, basis, getattr(basis, name)) for index, basis in bases.items() for name in _NAMES]
    ratios = _ratios(sides, rank, ratio)
    if spread == "uniform":
        for side, share in zip(sides, ratios, strict=True):
            side.rank = _round_down(share * side.basis.width)
    else:
        _give_by_energy(sides, sum(share * side.full for side, share in zip(sides, ratios, strict=True)))
    found = {(side.index, side.name): side.rank for side in sides}
    return {index: LayerRanks(*(found[index, name] for name in _NAMES)) for index in bases}


_NAMES = ("keys", "values")


class _Side:
    """One side of one layer while ranks are given out."""

    def __init__(self, index: int, name: str, layer: LayerBasis, basis: SideBasis) -> None:
        self.index, self.name, self.basis = index, name, basis
        self.groups = basis.down.shape[0]
        self.head_dim = basis.width * self.groups // layer.heads
        self.full = self.groups * basis.width
        self.rank = STEP
        steps = basis.width // STEP
        saved = basis.energy.sum(0)[: steps * STEP].reshape(steps, STEP).sum(1)
        weight = SCORE_WEIGHT * layer.score if name == "keys" else 1.0
        self.saved = (weight * saved / (STEP * self.groups)).tolist()

    @property
    def gain(self) -> float | None:
        """Error that the next directions save per number stored; None if there are no more."""
        step = self.rank // STEP
        return self.saved[step] if step < len(self.saved) else None


def _ratios(sides: list[_Side], rank: int | None, ratio: float | None) -> list[float]:
    """The share of the full width that is asked for, by side."""
    if (rank is None) == (ratio is None):
        raise ValueError(f"rank={rank!r}, ratio={ratio!r}; accepted: one of them, the other None")
    if rank is not None:
        most = min(side.head_dim for side in sides)
        least = max(-(-STEP * side.head_dim // side.basis.width) for side in sides)
        if isinstance(rank, bool) or not isinstance(rank, int) or not least <= rank <= most:
            raise ValueError(f"rank={rank!r}; accepted: whole numbers from {least} to the head dimension, {most}")
        return [rank / side.head_dim for side in sides]
    assert ratio is not None
    lowest = max(STEP / side.basis.width for side in sides)
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not lowest <= ratio <= 1:
        raise ValueError(f"ratio={ratio!r}; accepted: from {lowest:g} to 1")
    return [float(ratio)] * len(sides)


def _give_by_energy(sides: list[_Side], budget: float) -> None:
    """Give ranks one step at a time to the side that gains most, up to ``budget`` numbers per token."""
    left = budget - sum(side.groups * STEP for side in sides)
    # The index in the list breaks ties, so that the outcome does not depend on the order of comparison.
    waiting = [(-side.gain, number) for number, side in enumerate(sides) if side.gain is not None]
    heapq.heapify(waiting)
    while waiting:
        _, number = heapq.heappop(waiting)
        side = sides[number]
        # Shares of widths are floats, hence half a number of slack.
        if side.groups * STEP > left + 0.5:
            continue
        side.rank += STEP
        left -= side.groups * STEP
        if side.gain is not None:
            heapq.heappush(waiting, (-side.gain, number))


def _round_down(width: float) -> int:
    """The largest multiple of the step up to ``width``, with some room for rounding errors."""
    return int(width + 1e-6) // STEP * STEP
