"""How many directions each layer keeps of its keys and of its values."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from hf_kvcache.lowrank.projection import LayerBasis, SideBasis

Spread = Literal["energy", "uniform"]

#: Ranks are multiples of this: codes of any number of bits then fill whole bytes.
STEP = 8


#: What the squared error of a score counts for beside that of a value as a share of its square. Measured: at half of
#: the width, SmolLM2's predictions have the least KL divergence about here.
SCORE_WEIGHT = 0.3


class LayerRanks(NamedTuple):
    """Widths of a layer's latents."""

    keys: int
    values: int


def choose_ranks(
    bases: Mapping[int, LayerBasis], rank: int | None = None, ratio: float | None = None, spread: Spread = "energy"
) -> dict[int, LayerRanks]:
    """Ranks of all layers, multiples of 8 from 8 up to the width, which together hold no more than was asked for.

    Args:
        bases: by index of the layer.
        rank: numbers per token, KV head and side, on average.
        ratio: the same as a share of the full width.
        spread: ``"uniform"``: every layer and side has the same share. ``"energy"``: 8 directions at a time, where they
            save the most per number held: of the values' squared error as a share of their squares, and of the
            scores' squared error times :data:`SCORE_WEIGHT`.

    Raises:
        ValueError: unless there is either a rank or a ratio, within its range, or for another spread.
    """
    if spread not in get_args(Spread):
        raise ValueError(f"spread={spread!r}; accepted: {', '.join(get_args(Spread))}")
    sides = [_Side(index, name, basis, getattr(basis, name)) for index, basis in bases.items() for name in _NAMES]
    ratios = _ratios(sides, rank, ratio)
    if spread == "uniform":
        for side, share in zip(sides, ratios, strict=True):
            side.rank = _floor(share * side.basis.width)
    else:
        _spread(sides, sum(share * side.full for side, share in zip(sides, ratios, strict=True)))
    found = {(side.index, side.name): side.rank for side in sides}
    return {index: LayerRanks(*(found[index, name] for name in _NAMES)) for index in bases}


_NAMES = ("keys", "values")


class _Side:
    """One side of one layer while ranks are handed out."""

    def __init__(self, index: int, name: str, layer: LayerBasis, basis: SideBasis) -> None:
        self.index, self.name, self.basis = index, name, basis
        self.latents = basis.down.shape[0]
        self.head_dim = basis.width * self.latents // layer.heads
        self.full = self.latents * basis.width
        self.rank = STEP
        steps = basis.width // STEP
        saved = basis.energy.sum(0)[: steps * STEP].reshape(steps, STEP).sum(1)
        weight = SCORE_WEIGHT * layer.score if name == "keys" else 1.0
        self.saved = (weight * saved / (STEP * self.latents)).tolist()

    @property
    def gain(self) -> float | None:
        """Error that the next directions save per number held; None if there are none."""
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


def _spread(sides: list[_Side], budget: float) -> None:
    """Hand out ranks one step at a time to whoever gains most, as long as ``budget`` numbers per token are not full."""
    left = budget - sum(side.latents * STEP for side in sides)
    # The place in the list breaks ties, so that the outcome does not depend on the order of comparison.
    waiting = [(-side.gain, place) for place, side in enumerate(sides) if side.gain is not None]
    heapq.heapify(waiting)
    while waiting:
        _, place = heapq.heappop(waiting)
        side = sides[place]
        # Half a number of slack: shares of widths are floats.
        if side.latents * STEP > left + 0.5:
            continue
        side.rank += STEP
        left -= side.latents * STEP
        if side.gain is not None:
            heapq.heappush(waiting, (-side.gain, place))


def _floor(width: float) -> int:
    return int(width + 1e-6) // STEP * STEP
