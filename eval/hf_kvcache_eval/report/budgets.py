"""Tables of caches that evict or read sparsely: a row a method, a column a share of the tokens that is kept or read."""

from __future__ import annotations

from collections.abc import Iterable

from hf_kvcache_eval.cells import Metric
from hf_kvcache_eval.report.compare import FEW, NOISE, UNKNOWN, WORSE, difference
from hf_kvcache_eval.report.costs import COSTS
from hf_kvcache_eval.report.document import BLANK, Block, Bullets, Entry, Heading, Table, Text, code
from hf_kvcache_eval.report.formats import number
from hf_kvcache_eval.report.load import FIDELITY, Comparison
from hf_kvcache_eval.report.names import FULL, TaskName, blind, keeps_dimensions, kept_share, reads_share
from hf_kvcache_eval.report.ranking import UNPAIRED, chance, legend, ranking

_REMARKS = {NOISE: " =", WORSE: " <", FEW: " ?", UNKNOWN: " ?"}
#: Metrics of fidelity that get a table; of other tasks it is the headline metric.
_FIDELITY = ("kl", "delta_nll")
#: The same where steps read some of the tokens: how many of the bytes, too.
_FIDELITY_OF_READS = ("kl", "top1", "read")


def budget_sections(found: Comparison) -> list[Block]:
    """A table for each task on which a policy was measured at two shares or more; nothing where there is none."""
    policies, shares = _policies(found), shares_of(found)
    reads = any(map(reads_share, policies))
    if len(shares) < 2 or set(policies) == {"random"}:
        return []
    blocks: list[Block] = []
    shown: list[str] = []
    comparisons = 0
    for task in found.tasks:
        names = (_FIDELITY_OF_READS if reads else _FIDELITY) if task.base == FIDELITY else None
        for name in names or (found.headline_name(task.text) or "",):
            table = budget_table(found, task, name, shares)
            if table.rows and _is_quality(found, task, name):
                blocks += [Heading(3, f"{task.text}: {name}"), table]
                by_share = {share: metrics_at(found, task, name, share) for share in shares}
                ranked = {share: metrics for share, metrics in by_share.items() if len(metrics) > 1}
                most = max(map(len, by_share.values()))
                neighbors = [
                    f"{_ranked_at(share, len(ranked[share]), most)}: {ranking(ranked[share])}" for share in ranked
                ]
                blocks.append(Bullets(neighbors))
                shown += [*neighbors, *(entry.text for row in table.rows for entry in row)]
                comparisons += sum(2 * len(metrics) - 2 for metrics in ranked.values())
    if not blocks:
        return []
    title = Heading(2, "By what is kept or read" if reads else "By what is kept")
    return [title, *_legend(policies, comparisons, legend(shown)), *blocks, *_costs(found, shares)]


def shares_of(found: Comparison) -> list[float]:
    """Every share that is kept or read, the largest first."""
    return sorted({share for policy in _policies(found).values() for share in policy}, reverse=True)


def percent_of(share: float) -> str:
    """A share kept or read, with all its digits."""
    return f"{100 * share:g} %"


def _ranked_at(share: float, policies: int, most: int) -> str:
    """A share, and how many policies were measured there if at another share there are more."""
    return percent_of(share) + (f" ({policies} of {most} policies)" if policies < most else "")


def _is_quality(found: Comparison, task: TaskName, name: str) -> bool:
    """Whether a metric is one that tells qualities apart: bytes of a task that takes times do not."""
    return bool(name) and any(
        cell.metrics[name].unit != "bytes" for cell in found.on(task.text) if name in cell.metrics
    )


def by_policy(found: Comparison, task: TaskName, name: str) -> dict[str, dict[float, Metric]]:
    """A metric of every policy by share, the largest share first; policies that have none are left out."""
    rows: dict[str, dict[float, Metric]] = {}
    for policy, caches in _policies(found).items():
        row = {share: found.metric(cache, task.text, name) for share, cache in sorted(caches.items(), reverse=True)}
        rows[policy] = {share: metric for share, metric in row.items() if metric is not None}
    return {policy: row for policy, row in rows.items() if row}


def metrics_at(found: Comparison, task: TaskName, name: str, share: float) -> dict[str, Metric]:
    """A metric of every policy at one share."""
    return {policy: row[share] for policy, row in by_policy(found, task, name).items() if share in row}


def _legend(policies: Iterable[str], comparisons: int, signs: str) -> list[Block]:
    reads, dimensions = any(map(reads_share, policies)), [keeps_dimensions(policy) for policy in policies]
    baseline = "the random choice" if reads else code("random")
    kept = "head dimension" if all(dimensions) else "prefilled tokens"
    columns = f"Columns are the shares of the {kept} that are kept"
    if any(dimensions) and not all(dimensions):
        columns += f" (of {code('latent')}, of the head dimension)"
    if reads:
        columns += f", or of the tokens held that a step of {code('sparse')} reads"
    columns = (
        f"{columns}. Best first, by the mean over the shares; ± is one standard error. A sign behind a value compares "
        f"it with {baseline} at the same share: “=” is a tie, “<” is worse, no sign is better. Below each table stand "
        "the neighbors of every column, best first."
    )
    note = (
        f"{code('read')}: bytes that the last step read, of those that it would read of all tokens. It counts first "
        "layers that read everything, layers in which a selector looks at everything, and what pages are chosen by."
    )
    return [Text(columns), Text(f"{signs} {chance(comparisons)}"), *([Text(note)] if reads else [])]


def _costs(found: Comparison, shares: list[float]) -> list[Block]:
    """What each policy costs at each share: bytes, times, and the tokens that no head keeps."""
    blocks: list[Block] = []
    for cost in COSTS:
        table = Table(["policy", *(percent_of(share) for share in shares)])
        for policy, caches in sorted(_policies(found).items()):
            table.add(code(policy), *(cost.text(found, caches[s]) if s in caches else BLANK for s in shares))
        if found.cell(FULL, found.memory_task or "") is not None:
            table.add(Entry(code(FULL), "reference"), *[Entry(cost.text(found, FULL), "reference")] * len(shares))
        table.rows = [row for row in table.rows if any(entry.text != BLANK for entry in row[1:])]
        if table.rows:
            blocks += [Heading(3, f"Costs: {cost.title}"), table]
    return blocks


def budget_table(found: Comparison, task: TaskName, name: str, shares: list[float]) -> Table:
    """One metric of a task, policies by shares; the full cache first."""
    table = Table(["policy", *(percent_of(share) for share in shares)])
    full = found.metric(FULL, task.text, name)
    rows = by_policy(found, task, name)
    least = 1 if any(map(reads_share, _policies(found))) else 2
    rows = {policy: row for policy, row in rows.items() if len(row) >= least}
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


def _rank(row: dict[float, Metric], shares: list[float]) -> tuple[bool, float]:
    """Sorts rows: those with every share first, then by the mean."""
    metrics = list(row.values())
    sign = -1 if metrics[0].higher_is_better else 1
    return len(metrics) < len(shares), sign * sum(metric.value for metric in metrics) / len(metrics)


def _entry(metric: Metric | None, baseline: Metric | None, is_baseline: bool) -> Entry:
    if metric is None:
        return Entry(BLANK)
    if baseline is None or is_baseline:
        return Entry(_number(metric))
    found = difference(metric, baseline)
    mark = {NOISE: "noise", WORSE: "worse"}.get(found.verdict, "better")
    return Entry(_number(metric) + _REMARKS.get(found.verdict, "") + ("" if found.paired else f" {UNPAIRED}"), mark)


def _number(metric: Metric) -> str:
    return number(metric.value, metric.stderr)
