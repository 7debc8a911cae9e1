"""Samples as tokens, in the order in which a cache meets them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hf_kvcache_eval.retrieval.sample import Sample


@dataclass(frozen=True)
class Prompt:
    """A sample as tokens.

    Attributes:
        sample: what it was made of.
        prefilled: tokens that the cache takes in at once and compresses.
        asked: tokens that are then decoded through the compressed cache.
        answer: tokens of the first answer.
    """

    sample: Sample
    prefilled: list[int]
    asked: list[int]
    answer: list[int]

    @property
    def tokens(self) -> int:
        """Tokens up to the end of the answer."""
        return len(self.prefilled) + len(self.asked) + len(self.answer)


def tokenized(sample: Sample, tokenizer: Any, literal: bool, query_aware: bool) -> Prompt:
    """Context and question are tokenized apart, so that the sequence is the same wherever the compression falls.

    Args:
        sample: the sample.
        tokenizer: the model's.
        literal: the answer follows as it is, instead of behind a space.
        query_aware: the question, but for its last token, is prefilled too.
    """
    context = tokenizer(sample.context, verbose=False)["input_ids"]
    answer = sample.answer if literal else f" {sample.answer}"
    question, answer_ids = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (sample.question, answer)
    )
    seen = len(question) - 1 if query_aware else 0
    return Prompt(sample, context + question[:seen], question[seen:], answer_ids)


def batches(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Batches of at most ``size`` prompts that decode equally many tokens before the answer."""
    by_length: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        by_length.setdefault(len(prompt.asked), []).append(prompt)
    for alike in by_length.values():
        for start in range(0, len(alike), size):
            yield alike[start : start + size]
