"""The text that facts are hidden in, cut at the ends of sentences."""

from __future__ import annotations

import math
import re
from typing import Any

_BETWEEN_SENTENCES = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'”’]))\s+(?=[A-Z\"'“‘(])")
#: Sentences that are tried when the next one no longer fits.
_TRIES = 64


class Haystack:
    """Sentences of a text with their lengths in tokens.

    Args:
        text: a paragraph a line; those that end without a full stop (headings, verse) are left out.
        name: in reports.
        tokenizer: counts the tokens.

    Raises:
        ValueError: if the text has no sentence.
    """

    def __init__(self, text: str, name: str, tokenizer: Any) -> None:
        self.name = name
        self.sentences = _sentences(text)
        if not self.sentences:
            raise ValueError(f"haystack {name!r} has no sentence")
        # As they stand in running text: with a space in front.
        encoded = tokenizer([f" {sentence}" for sentence in self.sentences], add_special_tokens=False)
        self.costs = [len(ids) for ids in encoded["input_ids"]]

    def take(self, start: int, budget: int) -> list[str]:
        """Sentences from the ``start``-th on, as many as fit into ``budget`` tokens; after the last comes the first.

        The last few may skip sentences that would not fit, so that what stays unused is short.
        """
        taken, skipped = [], 0
        for at in range(start, start + budget + _TRIES):
            sentence, cost = self.sentences[at % len(self.sentences)], self.costs[at % len(self.sentences)]
            if cost <= budget:
                taken.append(sentence)
                budget -= cost
            else:
                skipped += 1
            if skipped == _TRIES:
                break
        return taken

    def start(self, first: int, index: int) -> int:
        """Where the ``index``-th sample begins: different for each, as long as there are sentences, and far apart."""
        count = len(self.sentences)
        step = max(1, round(count * 0.618))
        while math.gcd(step, count) > 1:
            step += 1
        return (first + index * step) % count


def _sentences(text: str) -> list[str]:
    paragraphs = [" ".join(line.split()) for line in text.splitlines()]
    return [s for p in paragraphs if re.search(r"[.!?][\"'”’]?$", p) for s in _BETWEEN_SENTENCES.split(p)]
