"""RULER's tasks on a compressed cache, one by one or all as one number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.retrieval.generator import check_count
from hf_kvcache_eval.retrieval.prompts import Prompt, batches, tokenized
from hf_kvcache_eval.retrieval.task import Asking, order_of
from hf_kvcache_eval.ruler.samples import TASKS, make_samples, score
from hf_kvcache_eval.statistics import mean_metric
from hf_kvcache_eval.task import Bench, Outcome, Piece, TaskInPieces

ALL = "ruler"


@dataclass
class RulerTask(TaskInPieces):
    """Prefill a context of RULER, compress, then ask.

    Prompts, lengths of outputs and scores are lm-eval's. There the question is part of what is prefilled; here it is
    decoded through the compressed cache, unless ``query_aware``.

    Attributes:
        kind: one of ``TASKS``, or ``"ruler"`` for the mean over all of them.
        length: tokens of a prompt and its output, as the generators count them.
        samples: of each task.
        query_aware: the question is in the cache before it is compressed, but for its last token.
        batch: samples decoded together.

    Raises:
        ValueError: naming the argument.
    """

    kind: str
    length: int = 4096
    samples: int = 20
    query_aware: bool = False
    batch: int = 4

    def __post_init__(self) -> None:
        if self.kind not in (accepted := [ALL, *TASKS]):
            raise ValueError(f"kind={self.kind!r}; accepted: {', '.join(accepted)}")
        for name in ("length", "samples", "batch"):
            check_count(name, getattr(self, name))

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.kind}@{self.length}{':aware' if self.query_aware else ''}"

    @property
    def tasks(self) -> list[str]:
        """The tasks that are asked."""
        return list(TASKS) if self.kind == ALL else [self.kind]

    def count(self, bench: Bench) -> int:
        return len(self._pieces(bench))

    def measure(self, bench: Bench, method: Method, index: int) -> Piece:
        task, prompts = self._pieces(bench)[index]
        asking = _Asking(bench, method, task)
        asking.check_fits(max(len(prompt.prefilled) + len(prompt.asked) for prompt in prompts) + asking.room(prompts))
        places: dict[str, list[Any]] = {
            "task": [task] * len(prompts),
            "index": [prompt.sample.index for prompt in prompts],
        }
        recall = [
            one["recall"]
            for rows in batches(prompts, self.batch if method.kind.rows else 1)
            for one in asking.recall(rows)
        ]
        return Piece(places | {"recall": recall}, asking.memory, asking.timing)

    def outcome(self, bench: Bench, found: Piece) -> Outcome:
        places = zip(found.found["task"], found.found["index"], strict=True)
        by_place = dict(zip(places, found.found["recall"], strict=True))
        scores = {task: [by_place[task, index] for index in range(self.samples)] for task in self.tasks}
        # Every task has as many samples, so the mean over sample i of all tasks is one independent sample.
        means = [sum(of_all) / len(of_all) for of_all in zip(*scores.values(), strict=True)]
        each = {task: mean_metric(of_task, unit="share") for task, of_task in scores.items()}
        return Outcome(
            metrics={"recall": mean_metric(means, unit="share")} | (each if self.kind == ALL else {}),
            memory=found.memory,
            protocol={
                "kind": self.kind,
                "length": self.length,
                "samples": self.samples,
                "query_aware": self.query_aware,
                "what": f"RULER's {', '.join(self.tasks)} by lm-eval's generators and scores; share of the answers in "
                f"a greedy output; {order_of(self.query_aware)}",
            },
            timing=found.timing,
        )

    def _pieces(self, bench: Bench) -> list[tuple[str, list[Prompt]]]:
        """Batches of samples of one task that have questions of one length, each with the task's name."""
        return [(task, rows) for task in self.tasks for rows in batches(self._prompts(bench, task), self.batch)]

    def _prompts(self, bench: Bench, task: str) -> list[Prompt]:
        key = ("ruler", task, self.length, self.samples, self.query_aware, bench.protocol.seed)
        if key not in bench.memo:
            made = make_samples(task, self.length, self.samples, bench.protocol.seed, bench.tokenizer)
            bench.memo[key] = [tokenized(sample, bench.tokenizer, False, self.query_aware) for sample in made]
        return bench.memo[key]


class _Asking(Asking):
    """RULER's way of asking: outputs of a fixed length that only a model's own token ends, and lm-eval's score."""

    def __init__(self, bench: Bench, method: Method, task: str) -> None:
        super().__init__(bench, method)
        self.task = task

    def room(self, rows: Sequence[Prompt]) -> int:
        return TASKS[self.task].new_tokens

    def complete(self, rows: Sequence[Prompt]) -> Callable[[int, list[int]], bool]:
        # What stands in an output stays there when it goes on. Else each would take up to 128 steps.
        decode = self.bench.tokenizer.decode
        return lambda row, output: self.share_found(rows[row], decode(output, skip_special_tokens=True)) == 1

    def stop(self) -> set[int]:
        return self.ends()

    def share_found(self, prompt: Prompt, text: str) -> float:
        return score(text, prompt.sample.answers)
