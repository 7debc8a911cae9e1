"""Where one sample is made: what is drawn for it, and the text around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from random import Random
from typing import Any

from hf_kvcache_eval.retrieval.haystack import Haystack
from hf_kvcache_eval.retrieval.sample import Sample


@dataclass(frozen=True)
class Place:
    """What a kind makes a sample of.

    Attributes:
        rng: the sample's own random numbers.
        depth: where the answer is to stand, 0 (start) to 1 (end of the context).
        index: the sample's number.
        length: tokens of context, question and answer together, at most.
        start: the haystack's sentence to begin with.
        haystack: the text around.
        tokenizer: counts the tokens.
    """

    rng: Random
    depth: float
    index: int
    length: int
    start: int
    haystack: Haystack
    tokenizer: Any

    def over(self, haystack: Haystack) -> Place:
        """The same place in another haystack."""
        return replace(self, haystack=haystack)

    def hide(self, intro: str, facts: Sequence[tuple[float, str]], question: str, answers: Sequence[str]) -> Sample:
        """Fill the context to the wanted length: ``intro``, then the haystack with each fact at its depth.

        Facts of equal depth keep their order.

        Raises:
            ValueError: if the length leaves no room for a haystack.
        """
        bare = intro + " ".join(fact for _, fact in facts)
        sample = Sample(bare, question, tuple(answers), self.depth, self.index)
        budget = free = self.left(sample)
        while True:
            hay = self.haystack.take(self.start, budget)
            if not hay:
                raise ValueError(f"length={self.length!r}; accepted: more than {self.length - free} tokens")
            filled = replace(sample, context=intro + " ".join(_insert(hay, facts)))
            if (over := -self.left(filled)) <= 0:
                return filled
            # Rare: tokens of sentences together were more than the sum of each alone.
            budget -= over

    def left(self, sample: Sample) -> int:
        """Tokens of the length that the sample does not use; below 0 if it is too long."""
        answer = " " + ", ".join(sample.answers)
        texts = [sample.context, sample.question, answer]
        return self.length - sum(len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"])


def _insert(hay: Sequence[str], facts: Sequence[tuple[float, str]]) -> list[str]:
    """The sentences with each fact in the gap between two of them that is nearest to its depth."""
    gaps = [0, *accumulate(len(sentence) + 1 for sentence in hay)]
    facts_of: dict[int, list[str]] = {}
    for depth, fact in sorted(facts, key=lambda item: item[0]):
        nearest = min(range(len(gaps)), key=[abs(gap - depth * gaps[-1]) for gap in gaps].__getitem__)
        facts_of.setdefault(nearest, []).append(fact)
    return [text for gap in range(len(gaps)) for text in (*facts_of.get(gap, []), *hay[gap : gap + 1])]
