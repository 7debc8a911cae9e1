"""A number in a text that says the same over and over (arXiv:2305.16300)."""

from __future__ import annotations

from hf_kvcache_eval.retrieval.haystack import Haystack
from hf_kvcache_eval.retrieval.place import Place
from hf_kvcache_eval.retrieval.registry import register
from hf_kvcache_eval.retrieval.sample import Sample

_NOISE = "The hills are high. The lake is deep. The road is long. We walk on. One step follows another."


@register("passkey", "a five-digit number hidden in a text that repeats itself")
def passkey(place: Place) -> Sample:
    """Ask for the number that is said once."""
    number = str(place.rng.randrange(10_000, 100_000))
    return place.over(Haystack(_NOISE, "noise", place.tokenizer)).hide(
        "A pass key is hidden in a long text that is of no importance. Find the pass key and remember it.\n",
        [(place.depth, f"The pass key is {number}. Remember it. {number} is the pass key.")],
        "\nWhat is the pass key? The pass key is",
        [number],
    )
