"""Spreading bytes over the layers of a model, so that they lose least in all (KVTuner, arXiv:2502.04420)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from hf_kvcache.codecs.layer_bits import Widths


class Choice(NamedTuple):
    """What one layer costs and loses with some widths.

    Attributes:
        widths: of its keys and values.
        bytes: that it stores, scales included.
        loss: what that costs, in a unit in which the losses of layers add up.
    """

    widths: Widths
    bytes: int
    loss: float


def allocate(choices: Mapping[int, Sequence[Choice]], budget: float) -> dict[int, Widths]:
    """Choose widths for each layer, with no more than ``budget`` bytes in all and a small sum of losses.

    Every layer begins with its cheapest widths. Then the layer goes first that gains most for a byte. A layer only goes
    to widths on the lower convex hull of its choices, so the result has the least sum of losses of all results that
    take as many bytes. What is left in the end buys what still fits.

    Args:
        choices: of each layer.
        budget: bytes in all.

    Raises:
        ValueError: if the cheapest choices take more than that.
    """
    hulls = {layer: _hull(of_layer) for layer, of_layer in choices.items()}
    chosen = {layer: hull[0] for layer, hull in hulls.items()}
    left = budget - sum(choice.bytes for choice in chosen.values())
    if left < 0:
        raise ValueError(f"budget={budget:.0f} bytes; accepted: from {budget - left:.0f}, the narrowest widths")
    steps = [
        ((now.loss - then.loss) / (then.bytes - now.bytes), layer, place)
        for layer, hull in hulls.items()
        for place, (now, then) in enumerate(pairwise(hull), 1)
    ]
    # On a hull the gain for a byte falls from step to step, so the steps of a layer are in their order.
    for _, layer, place in sorted(steps, key=lambda step: -step[0]):
        then = hulls[layer][place]
        if chosen[layer] is hulls[layer][place - 1] and then.bytes - chosen[layer].bytes <= left:
            left -= then.bytes - chosen[layer].bytes
            chosen[layer] = then
    while True:
        gains = [
            (chosen[layer].loss - choice.loss, layer, choice)
            for layer, of_layer in choices.items()
            for choice in of_layer
            if choice.bytes - chosen[layer].bytes <= left and choice.loss < chosen[layer].loss
        ]
        if not gains:
            return {layer: choice.widths for layer, choice in chosen.items()}
        _, layer, choice = max(gains, key=lambda gain: gain[0])
        left -= choice.bytes - chosen[layer].bytes
        chosen[layer] = choice


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull of loss against bytes, the cheapest first."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda one: (one.bytes, one.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-1], choice) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(first: Choice, second: Choice) -> float:
    return (second.loss - first.loss) / (second.bytes - first.bytes)
