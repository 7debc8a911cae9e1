"""What a cache costs, beside what it loses: bytes, times, and tokens that are gone from all heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_kvcache_eval.report.document import BLANK
from hf_kvcache_eval.report.formats import number, percent
from hf_kvcache_eval.report.load import Comparison


@dataclass(frozen=True)
class Cost:
    """One column.

    Attributes:
        column: its name.
        title: what it is, in full.
        text: what stands there for a cache; a blank where it was not measured.
    """

    column: str
    title: str
    text: Callable[[Comparison, str], str]


def cost_columns(found: Comparison, caches: Sequence[str]) -> list[Cost]:
    """The costs that were measured for any of ``caches``."""
    return [cost for cost in COSTS if any(cost.text(found, cache) != BLANK for cache in caches)]


def _bytes(found: Comparison, cache: str) -> str:
    memory = found.memory(cache)
    return percent(memory.ratio_bf16 if memory else None)


def _lost(found: Comparison, cache: str) -> str:
    metrics = (found.metric(cache, task.text, "lost") for task in reversed(found.fidelity))
    metric = next((metric for metric in metrics if metric is not None), None)
    return percent(metric.value if metric else None)


def _compression(found: Comparison, cache: str) -> str:
    time = found.time(cache, found.speed_task or "")
    return number(1e3 * time.compress) if time and time.compress is not None else BLANK


def _step(found: Comparison, cache: str) -> str:
    time = found.time(cache, found.speed_task or "")
    return number(time.median if time else None)


#: In the order of their columns.
COSTS = (
    Cost("bytes", "bytes held, of a bfloat16 DynamicCache", _bytes),
    Cost("lost", "global eviction ratio, the share of the tokens that no head of any layer keeps", _lost),
    Cost("compression, ms", "milliseconds of the compression behind a prefill", _compression),
    Cost("step, ms", "milliseconds of a decoded token", _step),
)
