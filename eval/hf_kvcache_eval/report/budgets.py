"""Tables of caches that evict or read sparsely: a row a method, a column a share of the tokens that is kept or read."""

from __future__ import annotations

from hf_kvcache_eval.cells import Metric
from hf_kvcache_eval.report.compare import NOISE, WORSE, difference
from hf_kvcache_eval.report.document import BLANK, Block, Entry, Heading, Table, Text, code
from hf_kvcache_eval.report.formats import number
from hf_kvcache_eval.report.load import FIDELITY, Comparison
from hf_kvcache_eval.report.names import FULL, TaskName, blind, kept_share, reads_share

_REMARKS = {NOISE: " =", WORSE: " <"}
#: Metrics of fidelity that get a table; of other tasks it is the headline metric.
_FIDELITY = ("kl", "delta_nll")
#: The same where steps read some of the tokens: how many of the bytes, too.
_FIDELITY_OF_READS = ("kl", "top1", "read")


def budget_sections(found: Comparison) -> list[Block]:
    """A table for each task on which a policy was measured at two shares or more; nothing where there is none."""
    policies = _policies(found)
    shares = sorted({share for policy in policies.values() for share in policy}, reverse=True)
    reads = any(map(reads_share, policies))
    if len(shares) < 2 or set(policies) == {"random"}:
        return []
    blocks: list[Block] = [Heading(2, "By what is kept or read" if reads else "By what is kept"), *_legend(reads)]
    for task in found.tasks:
        names = (_FIDELITY_OF_READS if reads else _FIDELITY) if task.base == FIDELITY else None
        for name in names or (found.headline_name(task.text) or "",):
            table = budget_table(found, task, name, shares)
            if table.rows:
                blocks += [Heading(3, f"{task.text}: {name}"), table]
    return blocks


def _legend(reads: bool) -> list[Block]:
    baseline = "the random choice" if reads else code("random")
    columns = "Columns are the shares of the prefilled tokens that are kept"
    if reads:
        columns += f", or of the tokens held that a step of {code('sparse')} reads"
    legend = (
        f"{columns}. ± is one standard error; “=” says that the value is within noise of {baseline} at the same share "
        "(paired differences, two standard errors), “<” that it is worse. Best first, by the mean over the shares."
    )
    note = (
        f"{code('read')}: bytes that the last step read, of those that it would read of all tokens. It counts first "
        "layers that read everything, layers in which a selector looks at everything, and what pages are chosen by."
    )
    return [Text(legend), *([Text(note)] if reads else [])]


def budget_table(found: Comparison, task: TaskName, name: str, shares: list[float]) -> Table:
    """One metric of a task, policies by shares; the full cache first."""
    table = Table(["policy", *(f"{100 * share:g} %" for share in shares)])
    full = found.metric(FULL, task.text, name)
    rows = {
        policy: {share: found.metric(cache, task.text, name) for share, cache in caches.items()}
        for policy, caches in _policies(found).items()
    }
    least = 1 if any(map(reads_share, rows)) else 2
    rows = {policy: row for policy, row in rows.items() if len(row) >= least and any(row.values())}
    if not rows:
        return table
    if full is not None:
        table.add(Entry(code(FULL), "reference"), *([Entry(_number(full), "reference")] * len(shares)))
    for policy in sorted(rows, key=lambda policy: _rank(rows[policy], shares)):
        row, baseline = rows[policy], blind(policy)
        entries = [_entry(row.get(share), rows.get(baseline, {}).get(share), policy == baseline) for share in shares]
        table.add(code(policy) + (" (baseline)" if policy == baseline else ""), *entries)
    return table


def _policies(found: Comparison) -> dict[str, dict[float, str]]:
    """Caches by what evicts and the share it keeps."""
    policies: dict[str, dict[float, str]] = {}
    for cache in found.caches:
        if (kept := kept_share(cache)) is not None:
            policies.setdefault(kept[0], {})[kept[1]] = cache
    return policies


def _rank(row: dict[float, Metric | None], shares: list[float]) -> tuple[bool, float]:
    """Sorts rows: those with every share first, then by the mean."""
    metrics = [metric for metric in row.values() if metric is not None]
    sign = -1 if metrics[0].higher_is_better else 1
    return len(metrics) < len(shares), sign * sum(metric.value for metric in metrics) / len(metrics)


def _entry(metric: Metric | None, baseline: Metric | None, is_baseline: bool) -> Entry:
    if metric is None:
        return Entry(BLANK)
    if baseline is None or is_baseline:
        return Entry(_number(metric))
    verdict = difference(metric, baseline).verdict
    mark = {NOISE: "noise", WORSE: "worse"}.get(verdict, "better")
    return Entry(_number(metric) + _REMARKS.get(verdict, ""), mark)


def _number(metric: Metric) -> str:
    return number(metric.value, metric.stderr)
