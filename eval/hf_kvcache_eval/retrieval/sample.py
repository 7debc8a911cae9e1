"""One prompt of a retrieval task."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """A context, and a question whose answer stands in it.

    Attributes:
        context: the text that is prefilled and compressed.
        question: what follows the context, up to where the answer begins.
        answers: what is expected: strings that the output has to contain, or the one literal continuation.
        depth: where in the context the answer stands, 0 (start) to 1 (end).
        index: the sample's number in its set.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    depth: float
    index: int

    @property
    def answer(self) -> str:
        """The first expected answer."""
        return self.answers[0]
