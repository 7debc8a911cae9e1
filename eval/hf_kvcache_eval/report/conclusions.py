"""What a comparison of policies at several budgets says, in sentences that are made from its figures."""

from __future__ import annotations

from collections.abc import Mapping

from hf_kvcache_eval.cells import Metric
from hf_kvcache_eval.peers.presses import PREFIX
from hf_kvcache_eval.report.budgets import metrics_at, percent_of, shares_of
from hf_kvcache_eval.report.compare import BETTER, NOISE, WORSE, difference
from hf_kvcache_eval.report.document import Block, Bullets, Heading, Text, code
from hf_kvcache_eval.report.formats import number
from hf_kvcache_eval.report.load import FIDELITY, Comparison
from hf_kvcache_eval.report.names import TaskName, blind
from hf_kvcache_eval.report.ranking import best_first
from hf_kvcache_eval.statistics import LEAST

#: Names in one sentence; of more it is said how many they are.
_NAMED = 8
#: Metrics by share and policy.
ByShare = Mapping[float, Mapping[str, Metric]]


def conclusions(found: Comparison) -> list[Block]:
    """Up to five sentences: the best of each task, what does no better than a random choice, and other libraries."""
    tables = _tables(found)
    if not tables:
        return []
    sentences = [_best(title, table) for title, table in tables.items()]
    sentences += [_no_better(title, table) for title, table in tables.items()][:2]
    told = [sentence for sentence in [*sentences[:4], _against_others(tables)] if sentence]
    intro = "Made from the figures above, by the comparisons of their tables."
    return [Heading(2, "Conclusions"), Text(intro), Bullets(told)] if told else []


def _tables(found: Comparison) -> dict[str, ByShare]:
    """The metric of each task that the conclusions are drawn from, at the shares where two policies or more have it."""
    tables: dict[str, ByShare] = {}
    for task in _tasks(found):
        name = "kl" if task.base == FIDELITY else found.headline_name(task.text) or ""
        by_share = {share: metrics_at(found, task, name, share) for share in shares_of(found)}
        by_share = {share: metrics for share, metrics in by_share.items() if len(metrics) > 2 and _enough(metrics)}
        if by_share:
            tables[f"{code(name)} of {code(task.text)}"] = by_share
    return tables


def _tasks(found: Comparison) -> list[TaskName]:
    """The longest fidelity task and the first that looks for something: two sentences each."""
    return [*found.fidelity[-1:], *found.retrieval[:1]]


def _enough(metrics: Mapping[str, Metric]) -> bool:
    """Whether the samples are enough to tell anything apart."""
    return all(len(metric.samples) >= LEAST for metric in metrics.values())


def _best(title: str, table: ByShare) -> str:
    parts = []
    for share, metrics in table.items():
        first, *others = best_first(metrics)
        ties = [name for name in others if difference(metrics[name], metrics[first]).verdict not in (WORSE, BETTER)]
        tied = f", not told apart from {_names(ties)}" if ties else ", told apart from all others"
        parts.append(f"at {percent_of(share)} {code(first)} ({_value(metrics[first])}){tied}")
    return f"Best {title}: {'; '.join(parts)}."


def _no_better(title: str, table: ByShare) -> str:
    """Policies that are better than the random choice at no share, and those that are worse at one."""
    verdicts: dict[str, list[str]] = {}
    for metrics in table.values():
        for name, metric in metrics.items():
            baseline = metrics.get(blind(name))
            if baseline is not None and name != blind(name):
                verdicts.setdefault(name, []).append(difference(metric, baseline).verdict)
    never = sorted(name for name, found in verdicts.items() if BETTER not in found and {NOISE, WORSE} & set(found))
    worse = sorted(name for name, found in verdicts.items() if WORSE in found)
    if not verdicts:
        return ""
    text = f"Better in {title} than a random choice at no share: {_names(never) if never else 'none'}"
    return f"{text}; worse at one or more: {_names(worse)}." if worse else f"{text}."


def _against_others(tables: Mapping[str, ByShare]) -> str:
    """This package's methods against the methods of the same name in another library, over all shares."""
    parts = []
    for title, table in tables.items():
        count = {BETTER: 0, NOISE: 0, WORSE: 0}
        for metrics in table.values():
            for name, metric in metrics.items():
                own = metrics.get(name.removeprefix(PREFIX))
                if name.startswith(PREFIX) and own is not None:
                    verdict = difference(own, metric).verdict
                    count[verdict if verdict in count else NOISE] += 1
        if sum(count.values()):
            parts.append(
                f"in {title} better {count[BETTER]} times, worse {count[WORSE]} times, tied {count[NOISE]} times"
            )
    return f"Against kvpress's methods of the same name and share: {'; '.join(parts)}." if parts else ""


def _names(names: list[str]) -> str:
    listed = ", ".join(map(code, names[:_NAMED]))
    return listed if len(names) <= _NAMED else f"{listed} and {len(names) - _NAMED} more"


def _value(metric: Metric) -> str:
    return number(metric.value, metric.stderr)
