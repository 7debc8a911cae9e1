"""The table that sums a comparison up: one row a cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_kvcache_eval.cells import Metric
from hf_kvcache_eval.report.costs import COSTS
from hf_kvcache_eval.report.document import BLANK, Block, Entry, Heading, Table, Text, code
from hf_kvcache_eval.report.formats import metric_entry, number
from hf_kvcache_eval.report.load import FOUND, Comparison
from hf_kvcache_eval.report.names import TaskName, is_baseline, is_full, is_noise_floor

#: Fidelity columns after the mean KL.
_MORE = {"kl_p99": "KL p99", "top1": "top-1", "delta_nll": "ΔNLL"}
_ACCURACIES = ("acc", "exact_match")


def headline(found: Comparison) -> list[Block]:
    """The table, and what its columns are."""
    return [Heading(2, "Summary"), headline_table(found), Text(_legend(found))]


def by_bytes(found: Comparison) -> list[str]:
    """Caches by the bytes they hold, those of unknown size last; then by KL, then by name."""

    def order(cache: str) -> tuple[float, float, str]:
        memory = found.memory(cache)
        kl = found.metric(cache, found.fidelity[-1].text, "kl") if found.fidelity else None
        return (memory.ratio_bf16 if memory else math.inf, kl.value if kl else math.inf, cache)

    return sorted(found.caches, key=order)


def headline_table(found: Comparison) -> Table:
    """Bytes, fidelity by prefix length, and means over groups of tasks, without columns that are empty."""
    fidelity = [(name, label, task) for name, label in {"kl": "KL", **_MORE}.items() for task in found.fidelity]
    groups = _groups(found)
    table = Table(
        [
            "cache",
            "bits",
            *(cost.column for cost in COSTS),
            *(f"{label} @{task.length}" for _, label, task in fidelity),
            *groups,
        ],
    )
    for cache in by_bytes(found):
        memory = found.memory(cache)
        table.add(
            Entry(code(cache) + _role(cache), "reference" if is_full(cache) or is_noise_floor(cache) else ""),
            number(memory.bits_per_element) if memory else BLANK,
            *(cost.text(found, cache) for cost in COSTS),
            *(metric_entry(found.metric(cache, task.text, name)) for name, _, task in fidelity),
            *(mean_over(found, cache, tasks) for tasks in groups.values()),
        )
    return table.without_empty_columns()


def mean_over(found: Comparison, cache: str, tasks: Sequence[TaskName]) -> Entry:
    """Mean of the headline metrics that a cache has in ``tasks``; how many, where some are missing."""
    metrics = [metric for task in tasks if (metric := found.metric(cache, task.text)) is not None]
    if not metrics:
        return Entry(BLANK)
    mean = mean_of(metrics)
    missing = f" ({len(metrics)} of {len(tasks)})" if len(metrics) < len(tasks) else ""
    return Entry(number(mean.value, mean.stderr) + missing)


def mean_of(metrics: Sequence[Metric]) -> Metric:
    """The mean of metrics of different tasks; their errors are independent."""
    errors = [metric.stderr for metric in metrics]
    known = [error for error in errors if error is not None]
    stderr = math.hypot(*known) / len(metrics) if len(known) == len(metrics) else None
    return Metric(sum(metric.value for metric in metrics) / len(metrics), stderr, metrics[0].higher_is_better)


def _groups(found: Comparison) -> dict[str, list[TaskName]]:
    """Columns that are means over tasks."""
    retrieval, language = found.retrieval, [task for task in found.language if _is_accuracy(found, task)]
    return {
        "quote NLL": found.quotes,
        **{
            f"{metric}{', aware' if aware else ''}": [
                task for task in retrieval if task.aware == aware and found.headline_name(task.text) == metric
            ]
            for metric in FOUND
            for aware in (False, True)
        },
        "accuracy": language,
    }


def _is_accuracy(found: Comparison, task: TaskName) -> bool:
    return (found.headline_name(task.text) or "").startswith(_ACCURACIES)


def _role(cache: str) -> str:
    if is_noise_floor(cache):
        return " (noise floor)"
    if is_baseline(cache):
        return " (baseline)"
    return " (reference)" if is_full(cache) else ""


def _legend(found: Comparison) -> str:
    groups = {name: ", ".join(code(task.text) for task in tasks) for name, tasks in _groups(found).items() if tasks}
    parts = ["By bytes held. ± is one standard error."]
    if found.memory_task:
        parts.append(
            f"Bits an element (packed part, scales counted) and bytes (all that is allocated, as a share of a bfloat16 "
            f"DynamicCache) are those of {code(found.memory_task)}."
        )
    if found.speed_task:
        parts.append(
            f"Milliseconds are those of {code(found.speed_task)}: one sequence, on a machine that may be busy."
        )
    if any("lost" in cell.metrics for cell in found.cells):
        parts.append("Lost: the share of the tokens that no head of any layer keeps (the global eviction ratio).")
    if found.fidelity:
        parts.append("KL and ΔNLL are in nats a token, top-1 is the share of equal likeliest tokens.")
    parts += [f"{name}: mean of {tasks}." for name, tasks in groups.items()]
    return " ".join(parts)
