"""Retrieval: does a compressed cache still hold what a question asks for?"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.cells import Memory, Metric
from hf_kvcache_eval.fidelity import memory_of
from hf_kvcache_eval.protocol import Reader
from hf_kvcache_eval.retrieval import generator, ready
from hf_kvcache_eval.retrieval.haystack import Haystack
from hf_kvcache_eval.retrieval.prompts import Prompt, batches, tokenized
from hf_kvcache_eval.retrieval.registry import kinds
from hf_kvcache_eval.retrieval.sample import Sample
from hf_kvcache_eval.statistics import mean_metric
from hf_kvcache_eval.task import Bench, Outcome, Piece, TaskInPieces
from hf_kvcache_eval.text import WALDEN, read_text

#: Tokens that an output may have beyond those of the expected answers.
_MORE = 8


@dataclass
class RetrievalTask(TaskInPieces):
    """Prefill a context, compress, then ask for something that stands in it.

    Attributes:
        kind: a kind of the generator, or a ready set of the data folder.
        length: tokens of context, question and answer.
        samples: how many.
        query_aware: the question is in the cache before it is compressed, but for its last token; otherwise it is
            decoded through the compressed cache.
        batch: samples decoded together.
        forced: the answer is given token by token instead of generated, and question and answer are decoded in one
            block: a fraction of the time. Within that block tokens see each other in full precision, as they would in
            the tail.

    Raises:
        ValueError: naming the argument.
    """

    kind: str
    length: int = 1024
    samples: int = 16
    query_aware: bool = False
    batch: int = 4
    forced: bool = False

    def __post_init__(self) -> None:
        if self.kind not in (accepted := [*kinds(), *ready.KINDS]):
            raise ValueError(f"kind={self.kind!r}; accepted: {', '.join(accepted)}")
        for name in ("length", "samples", "batch"):
            generator.check_count(name, getattr(self, name))

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.kind}@{self.length}{':aware' if self.query_aware else ''}{':forced' if self.forced else ''}"

    @property
    def literal(self) -> bool:
        """Whether the answer is scored token by token, as a continuation."""
        return self.kind == "longctx_quote" if self.kind in ready.KINDS else kinds()[self.kind].literal

    @property
    def scored(self) -> bool:
        """Whether the answer is given and scored, instead of generated."""
        return self.literal or self.forced

    def count(self, bench: Bench) -> int:
        return len(self._batches(bench))

    def measure(self, bench: Bench, method: Method, index: int) -> Piece:
        prompts = self._batches(bench)[index]
        asking = Asking(bench, method)
        asking.check_fits(max(prompt.tokens for prompt in prompts))
        scores: list[dict[str, float]] = []
        for rows in batches(prompts, self.batch if method.kind.rows else 1):
            scores += asking.score(rows, self.forced) if self.scored else asking.recall(rows)
        found: dict[str, list[Any]] = {name: [score[name] for score in scores] for name in scores[0]}
        return Piece({"index": [prompt.sample.index for prompt in prompts]} | found, asking.memory, asking.timing)

    def outcome(self, bench: Bench, found: Piece) -> Outcome:
        columns = dict(found.found)
        place = {index: at for at, index in enumerate(columns.pop("index"))}
        prompts, text = self.prompts(bench)
        scores = [{name: x[place[p.sample.index]] for name, x in columns.items()} for p in prompts]
        return Outcome(
            metrics=metrics_of(scores, "nll" if self.literal else None),
            memory=found.memory,
            protocol={
                "kind": self.kind,
                "length": self.length,
                "samples": self.samples,
                "query_aware": self.query_aware,
                "generator": generator.VERSION,
                "text": text,
                "what": self._what(),
            },
            timing=found.timing,
        )

    def _batches(self, bench: Bench) -> list[list[Prompt]]:
        """The samples of each piece."""
        return list(batches(self.prompts(bench)[0], self.batch))

    def prompts(self, bench: Bench) -> tuple[list[Prompt], str]:
        """The samples as tokens, and the name of their text."""
        key = ("prompts", self.name, self.samples, bench.protocol.seed, str(bench.data))
        if key not in bench.memo:
            made, text = self._samples(bench)
            tokens = [tokenized(sample, bench.tokenizer, self.literal, self.query_aware) for sample in made]
            bench.memo[key] = tokens, text
        return bench.memo[key]

    def _samples(self, bench: Bench) -> tuple[list[Sample], str]:
        """The samples and the name of their text."""
        if self.kind in ready.KINDS:
            return ready.read_ready(bench.data, self.kind, self.length, self.samples)
        key = ("haystack", str(bench.data))
        if key not in bench.memo:
            bench.memo[key] = Haystack(*read_text(bench.data, WALDEN), bench.tokenizer)
        haystack = bench.memo[key]
        seed = bench.protocol.seed
        made = generator.samples(self.kind, self.length, self.samples, seed, bench.tokenizer, haystack)
        return made, haystack.name

    def _what(self) -> str:
        what = "a ready set" if self.kind in ready.KINDS else kinds()[self.kind].what
        return f"{what}; {order_of(self.query_aware)}; {self._how()}"

    def _how(self) -> str:
        """What the headline metric is."""
        if self.literal:
            return "nats per token of the answer"
        if self.forced:
            return "share of the samples of which every token of the answer is the likeliest, given those before it"
        return "share of the answers in a greedy output"


class Asking:
    """One method's answers, batch by batch, with what they took."""

    def __init__(self, bench: Bench, method: Method) -> None:
        self.bench, self.method = bench, method
        self.model = bench.model(method.dtype)
        self.memory: Memory | None = None
        self.timing: dict[str, float] = {"decode_seconds": 0.0}

    def check_fits(self, tokens: int) -> None:
        """ValueError if the model has no positions for ``tokens``."""
        config = self.model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise ValueError(f"samples take up to {tokens} tokens, and the model has {limit} positions")

    def recall(self, rows: Sequence[Prompt]) -> list[dict[str, float]]:
        """Generate; the share of each row's answers in its output."""
        reader = self._prefilled(rows)
        started = time.perf_counter()
        outputs = reader.generate(_asked(rows), self.room(rows), self.stop(), self.complete(rows))
        self.timing["decode_seconds"] += time.perf_counter() - started
        texts = self.bench.tokenizer.batch_decode(outputs, skip_special_tokens=True)
        return [{"recall": self.share_found(prompt, text)} for prompt, text in zip(rows, texts, strict=True)]

    def share_found(self, prompt: Prompt, text: str) -> float:
        """The share of a prompt's answers in an output."""
        return recall_of(prompt.sample.answers, text)

    def complete(self, rows: Sequence[Prompt]) -> Callable[[int, list[int]], bool]:
        """Whether the output of one of ``rows`` needs no more tokens; here it always may go on."""
        return lambda row, output: False

    def room(self, rows: Sequence[Prompt]) -> int:
        """Tokens that the outputs of ``rows`` may have."""
        answers = [f" {', '.join(prompt.sample.answers)}" for prompt in rows]
        tokenized = self.bench.tokenizer(answers, add_special_tokens=False)["input_ids"]
        return max(map(len, tokenized)) + _MORE

    def score(self, rows: Sequence[Prompt], at_once: bool = False) -> list[dict[str, float]]:
        """Teacher forcing: the scores of each row's answer, as in :func:`scores_of`.

        Args:
            rows: prompts that ask equally many tokens.
            at_once: decode question and answer in one block; otherwise the answer token by token.
        """
        reader = self._prefilled(rows)
        started = time.perf_counter()
        asked, width = _asked(rows), max(len(prompt.answer) for prompt in rows)
        # What follows a row's own answer is decoded after it, hence changes nothing, and is not counted.
        answers = torch.tensor([prompt.answer + [0] * (width - len(prompt.answer)) for prompt in rows])
        tokens, before = torch.cat([asked, answers[:, :-1]], 1), asked.shape[1] - 1
        if at_once:
            reader.block = tokens.shape[1]
        else:
            if before:
                next(reader.logits(tokens[:, :before], skip=before), None)
            reader.block, tokens = 1, tokens[:, before:]
        log_probs, greedy = reader.score(tokens, answers)
        self.timing["decode_seconds"] += time.perf_counter() - started
        sizes = [len(prompt.answer) for prompt in rows]
        return [scores_of(log_probs[row, :size], greedy[row, :size]) for row, size in enumerate(sizes)]

    def _prefilled(self, rows: Sequence[Prompt]) -> Reader:
        reader = self.bench.reader(self.method)
        reader.prefill([prompt.prefilled for prompt in rows])
        tokens = sum(len(prompt.prefilled) for prompt in rows)
        self.memory = memory_of(reader.caches[0], self.model.config, 1, tokens)
        return reader

    def stop(self) -> set[int]:
        """Tokens that end an output: the model's own, and all with a line break in them."""
        key, tokenizer = ("line breaks",), self.bench.tokenizer
        if key not in self.bench.memo:
            texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
            self.bench.memo[key] = {token for token, text in enumerate(texts) if "\n" in text}
        return self.bench.memo[key] | self.ends()

    def ends(self) -> set[int]:
        """The model's own tokens that end an output."""
        return end_tokens(self.model, self.bench.tokenizer)


def order_of(query_aware: bool) -> str:
    """In words, which of question and compression comes first."""
    return "compressed with the question" if query_aware else "compressed before the question is read"


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a text of ``model``; the tokenizer's where the model has no list of its own."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends, tokenizer.eos_token_id]
    return {end for end in ends if end is not None}


def recall_of(answers: Sequence[str], output: str) -> float:
    """Share of ``answers`` that stand in ``output`` as words of their own."""
    return sum(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", output) is not None for answer in answers) / len(answers)


def _asked(rows: Sequence[Prompt]) -> torch.Tensor:
    return torch.tensor([prompt.asked for prompt in rows])


def scores_of(log_probs: torch.Tensor, greedy: torch.Tensor) -> dict[str, float]:
    """The scores of an answer of ``n`` tokens from their log-probabilities and whether each was the likeliest, ``[n]``.

    Returns:
        ``exact``: 1 if all were the likeliest, else 0; ``nll``: the mean, in nats; ``greedy``: the share that were.
    """
    return {
        "exact": float(greedy.all()),
        "nll": -log_probs.mean().item(),
        "greedy": greedy.double().mean().item(),
    }


def metrics_of(found: Sequence[dict[str, float]], headline: str | None = None) -> dict[str, Metric]:
    """The metrics of a task from the scores of its samples; ``headline`` first, else in the scores' order."""
    unit = {"nll": "nats"}
    return {
        name: mean_metric([scores[name] for scores in found], name != "nll", unit.get(name, "share"))
        for name in sorted(found[0], key=lambda name: name != headline)
    }
