"""Tables of caches that evict: a row a policy, a column a share of the tokens that is kept."""

from __future__ import annotations

from hf_kvcache_eval.cells import Metric
from hf_kvcache_eval.report.compare import NOISE, WORSE, difference
from hf_kvcache_eval.report.document import BLANK, Block, Entry, Heading, Table, Text, code
from hf_kvcache_eval.report.formats import number
from hf_kvcache_eval.report.load import FIDELITY, Comparison
from hf_kvcache_eval.report.names import FULL, TaskName, kept_share

#: What every policy has to beat at the same share.
_BASELINE = "random"
_REMARKS = {NOISE: " =", WORSE: " <"}
#: Metrics of fidelity that get a table; of other tasks it is the headline metric.
_FIDELITY = ("kl", "delta_nll")


def budget_sections(found: Comparison) -> list[Block]:
    """A table for each task on which a policy was measured at two shares or more; nothing where there is none."""
    policies = _policies(found)
    shares = sorted({share for policy in policies.values() for share in policy}, reverse=True)
    if len(shares) < 2 or set(policies) == {_BASELINE}:
        return []
    legend = (
        f"Columns are the shares of the prefilled tokens that are kept. ± is one standard error; “=” says that the "
        f"value is within noise of {code(_BASELINE)} at the same share (paired differences, two standard errors), “<” "
        "that it is worse. Best first, by the mean over the shares."
    )
    blocks: list[Block] = [Heading(2, "By what is kept"), Text(legend)]
    for task in found.tasks:
        for name in _FIDELITY if task.base == FIDELITY else (found.headline_name(task.text) or "",):
            table = budget_table(found, task, name, shares)
            if table.rows:
                blocks += [Heading(3, f"{task.text}: {name}"), table]
    return blocks


def budget_table(found: Comparison, task: TaskName, name: str, shares: list[float]) -> Table:
    """One metric of a task, policies by shares; the full cache first."""
    table = Table(["policy", *(f"{100 * share:g} %" for share in shares)])
    full = found.metric(FULL, task.text, name)
    rows = {
        policy: {share: found.metric(cache, task.text, name) for share, cache in caches.items()}
        for policy, caches in _policies(found).items()
    }
    rows = {policy: row for policy, row in rows.items() if len(row) > 1 and any(row.values())}
    if not rows:
        return table
    if full is not None:
        table.add(Entry(code(FULL), "reference"), *([Entry(_number(full), "reference")] * len(shares)))
    for policy in sorted(rows, key=lambda policy: _rank(rows[policy], shares)):
        row = rows[policy]
        entries = [_entry(row.get(share), rows.get(_BASELINE, {}).get(share), policy == _BASELINE) for share in shares]
        table.add(code(policy) + (" (baseline)" if policy == _BASELINE else ""), *entries)
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
