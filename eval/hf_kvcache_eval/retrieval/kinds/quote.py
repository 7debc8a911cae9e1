"""Continue a passage of the context word for word: what even 3 and 4 bits can be told apart by."""

from __future__ import annotations

from collections.abc import Sequence

from hf_kvcache_eval.retrieval.place import Place
from hf_kvcache_eval.retrieval.registry import register
from hf_kvcache_eval.retrieval.sample import Sample

CUE, ANSWER = 12, 20


@register("quote", f"the next {ANSWER} words of a passage of prose whose first {CUE} words are given", literal=True)
def quote(place: Place) -> Sample:
    """Give the first words of the passage nearest to the place's depth."""
    budget = place.length
    while True:
        hay = place.haystack.take(place.start, budget)
        context, starts = " ".join(hay), _starts(hay)
        if not starts:
            raise ValueError(f"length={place.length!r}; accepted: more than a passage of {CUE + ANSWER} words takes")
        begin = min(starts, key=lambda at: abs(at / len(context) - place.depth))
        words = context[begin:].split(" ")[: CUE + ANSWER]
        question, answer = " ".join(words[:CUE]), " ".join(words[CUE:])
        sample = Sample(context, f"\n\n{question}", (f" {answer}",), begin / len(context), place.index)
        if (over := -place.left(sample)) <= 0:
            return sample
        budget -= over


def _starts(hay: Sequence[str]) -> list[int]:
    """Where in the joined text the sentences begin from which on there are enough words."""
    lengths = [len(sentence.split(" ")) for sentence in hay]
    left, offset, starts = sum(lengths), 0, []
    for sentence, length in zip(hay, lengths, strict=True):
        if left >= CUE + ANSWER:
            starts.append(offset)
        left, offset = left - length, offset + len(sentence) + 1
    return starts
