"""Chains of assignments, and the question which variables have a value (variable tracking, RULER, arXiv:2404.06654)."""

from __future__ import annotations

from random import Random
from string import ascii_uppercase

from hf_kvcache_eval.retrieval.keys import draw_numbers
from hf_kvcache_eval.retrieval.place import Place
from hf_kvcache_eval.retrieval.registry import register
from hf_kvcache_eval.retrieval.sample import Sample

CHAINS, HOPS = 2, 1


@register("vartrack", f"the variables of one of {CHAINS} chains of {HOPS} assignments to each other, hidden in prose")
def vartrack(place: Place) -> Sample:
    """Ask for the variables of the first chain, whose value is assigned at the place's depth."""
    names, values = _names(place.rng, CHAINS * (HOPS + 1)), draw_numbers(place.rng, CHAINS, 5)
    chains = [names[first::CHAINS] for first in range(CHAINS)]
    facts: list[tuple[float, str]] = []
    for chain, number, root in zip(chains, values, [place.depth, *_depths(place.rng, CHAINS - 1)], strict=True):
        depths = [root, *(root + (1 - root) * share for share in _depths(place.rng, HOPS))]
        right = [number, *(f"VAR {name}" for name in chain[:-1])]
        said = [f"VAR {name} = {held}." for name, held in zip(chain, right, strict=True)]
        facts += zip(depths, said, strict=True)
    value = values[0]
    return place.hide(
        "Variables are assigned in the following text. Remember which variables have which value.\n",
        facts,
        f"\nWhich variables have the value {value}? The {HOPS + 1} variables that have the value {value} are VAR",
        chains[0],
    )


def _depths(rng: Random, count: int) -> list[float]:
    return sorted(rng.random() for _ in range(count))


def _names(rng: Random, count: int) -> list[str]:
    """``count`` different names of three letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choice(ascii_uppercase) for _ in range(3))] = None
    return list(names)
