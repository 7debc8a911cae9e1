"""A magic number under one of many keys, in prose: the needle in a haystack."""

from __future__ import annotations

from hf_kvcache_eval.retrieval.keys import draw_keys, draw_numbers
from hf_kvcache_eval.retrieval.place import Place
from hf_kvcache_eval.retrieval.registry import register
from hf_kvcache_eval.retrieval.sample import Sample


@register("needle", "a seven-digit number under a key, hidden in prose")
def needle(place: Place) -> Sample:
    """Ask for the one number of the text."""
    return hide_numbers(place, 1)


def hide_numbers(place: Place, count: int) -> Sample:
    """Hide ``count`` numbers, the first of them at the place's depth, and ask for that one."""
    keys, numbers = draw_keys(place.rng, count), draw_numbers(place.rng, count, 7)
    depths = [place.depth, *(place.rng.random() for _ in range(count - 1))]
    said = [f"The magic number of the {key} is {number}." for key, number in zip(keys, numbers, strict=True)]
    return place.hide(
        "A magic number is mentioned somewhere in the following text. Remember it for a question.\n",
        list(zip(depths, said, strict=True)),
        f"\nWhat is the magic number of the {keys[0]}? The magic number of the {keys[0]} is",
        numbers[:1],
    )
