"""lm-eval's tasks as tasks of a comparison."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import lm_eval.api.task
import torch
from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.cells import Metric
from hf_kvcache_eval.lm import KVCacheLM, tasks_folder
from hf_kvcache_eval.lm_groups import Group
from hf_kvcache_eval.statistics import mean_metric, standard_error
from hf_kvcache_eval.task import Bench, Outcome, Task

_UNITS = {"acc": "share", "acc_norm": "share", "exact_match": "share", "recall": "share", "word_nll": "nats"}


@dataclass
class LmTask(Task):
    """One task of lm-eval, through its own code.

    Attributes:
        task: lm-eval's name of it; where the data folder is there and ``local_<task>`` exists, that is taken.
        label: the name in reports; the task's if empty.
        limit: documents, from the first on; None for all.
        metrics: which to report, headline first; all of the task's if empty.
        batch_size: sequences at a time.
        num_fewshot: examples before each question.
    """

    task: str
    label: str = ""
    limit: int | None = None
    metrics: Sequence[str] = ()
    batch_size: int = 8
    num_fewshot: int = 0

    @property
    def name(self) -> str:  # type: ignore[override]
        name = self.label or self.task.removeprefix("local_")
        return f"{name}:{self.num_fewshot}shot" if self.num_fewshot else name

    def run(self, bench: Bench, method: Method) -> Outcome:
        with _quiet():
            task = self._load(bench)
            lm = _BenchLM(
                bench.model(method.dtype),
                method.spec.text,
                tokenizer=bench.tokenizer,
                batch_size=self.batch_size,
                **asdict(bench.protocol),
            )
            lm.advance, lm.prefills = bench.advance, bench.prefills
            started = time.perf_counter()
            # Not simple_evaluate(), which after each call spends ten seconds on a description of the machine.
            torch.manual_seed(bench.protocol.seed)
            tasks = {"tasks": {task.task_name: task}}
            results = evaluate(lm, tasks, limit=self.limit, bootstrap_iters=0, log_samples=True)
        assert results is not None, "not on rank 0"
        documents = results["samples"][task.task_name]
        return Outcome(
            metrics=self._metrics(task, documents),
            protocol={
                "task": task.task_name,
                "documents": len({document["doc_id"] for document in documents}),
                "fewshot": self.num_fewshot,
                "block": bench.protocol.block,
                "single_pass": lm.single_pass,
                "compressed_share": round(lm.prefilled.share, 6),
                "nothing_compressed": lm.prefilled.empty,
                "what": "the context but for its last token is prefilled; all scored tokens are decoded through the "
                "cache; compressed_share: of the prefilled tokens, those that were packed or evicted when read; "
                "nothing_compressed: sequences that begin with one token, which is not prefilled",
            },
            timing={"seconds": time.perf_counter() - started},
        )

    def _load(self, bench: Bench) -> Any:
        """lm-eval's task, loaded once for all methods."""
        if (self.limit is not None and self.limit < 1) or self.num_fewshot < 0:
            raise ValueError(
                f"limit={self.limit!r}, num_fewshot={self.num_fewshot!r}; accepted: from 1 or None; from 0"
            )
        key = ("lm-eval task", self.task, self.num_fewshot)
        if key not in bench.memo:
            task = bench.memo[key] = _task(self.task, bench)
            task.set_config("num_fewshot", self.num_fewshot)
        bench.memo[key].set_fewshot_seed(bench.protocol.seed)  # each method is to see the same examples
        return bench.memo[key]

    def _metrics(self, task: Any, documents: Sequence[dict[str, Any]]) -> dict[str, Metric]:
        found = {
            name: _metric(name, [document[name] for document in documents if name in document], combine, higher)
            for name, combine in task.aggregation().items()
            for higher in [task.higher_is_better().get(name) is not False]
        }
        if unknown := [name for name in self.metrics if name not in found]:
            raise ValueError(f"metrics={unknown[0]!r} of task={self.task!r}; accepted: {', '.join(found)}")
        return {name: found[name] for name in self.metrics or found}


class _BenchLM(KVCacheLM):
    """The model of a bench: it draws no bars and tells how far it is."""

    advance: Callable[[float], None]
    total = 0
    done = 0

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.total += len(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        self.total += len(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self.total += len(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._step(len(inps))
        return super()._model_call(inps, *args, **kwargs)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        out = super()._model_generate(context, max_length, stop, **kwargs)
        self._step(len(context))
        return out

    def _score(self, batch: Sequence[Group]) -> list[tuple[int, tuple[float, bool]]]:
        scored = super()._score(batch)
        self._step(len(scored))
        return scored

    def _step(self, count: int) -> None:
        self.done += count  # of windows, where texts are longer than the model's: more than requests
        self.advance(min(1.0, self.done / self.total))


def _task(name: str, bench: Bench) -> Any:
    """Find and load a task; ValueError where there is none or no data for it."""
    local = name if name.startswith("local_") else f"local_{name}"
    metadata = {"data_root": str(bench.data)} if bench.data is not None else {}
    manager = TaskManager(include_path=tasks_folder(), include_defaults=False, metadata=metadata)
    if local not in manager.all_tasks or (bench.data is None and local != name):
        manager = TaskManager(include_path=tasks_folder(), metadata=metadata)
        local = name
    if local not in manager.all_subtasks:
        raise ValueError(f"task={name!r} is no task of lm-eval or of this package")
    try:
        return manager.load([local])["tasks"][local]
    except (OSError, ImportError) as error:  # a hub that cannot be reached, a package that a task needs
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"task={name!r} cannot be loaded ({reason}); for local data set HF_KVCACHE_EVAL_DATA"
        ) from error


def _metric(name: str, samples: list[Any], combine: Callable[[list[Any]], float], higher: bool) -> Metric:
    """What lm-eval aggregates ``samples`` to, with a standard error and a number for each document.

    For a mean these are the samples. For anything else (perplexity) they are jackknife pseudo-values: their mean is the
    estimate without its first-order bias, their standard error its standard error, and paired differences of them are
    as valid (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 11).
    """
    value = float(combine(samples))
    unit = _UNITS.get(name, "")
    numbers = [float(x) if isinstance(x, int | float) else math.nan for x in samples]
    if math.isclose(value, math.fsum(numbers) / len(numbers), rel_tol=1e-9, abs_tol=1e-12):
        return mean_metric(numbers, higher, unit)
    count = len(samples)
    if count < 2:
        return Metric(value, None, higher, unit)
    without = [float(combine(samples[:i] + samples[i + 1 :])) for i in range(count)]
    pseudo = [count * value - (count - 1) * rest for rest in without]
    return Metric(value, standard_error(pseudo), higher, unit, pseudo)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back lm-eval's log and the bars over documents: the comparison draws its own."""
    logger, tqdm, bars = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm, datasets.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = lambda documents, **_: documents
    datasets.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = tqdm
        if bars:
            datasets.enable_progress_bar()
