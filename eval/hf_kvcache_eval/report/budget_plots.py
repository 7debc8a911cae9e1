"""Lines: a metric by the share that is kept, for a choice of policies."""

from __future__ import annotations

from pathlib import Path

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from hf_kvcache_eval.cells import Metric
from hf_kvcache_eval.report.budgets import by_policy, percent_of, shares_of
from hf_kvcache_eval.report.curves import legend
from hf_kvcache_eval.report.document import Picture, code
from hf_kvcache_eval.report.load import FIDELITY, Comparison
from hf_kvcache_eval.report.names import TaskName
from hf_kvcache_eval.report.style import figure, save, styles

#: Policies in a plot besides the random choice; more cannot be told apart.
_LINES = 8


def by_budget(found: Comparison, folder: Path) -> list[Picture]:
    """KL of the longest fidelity task and the first retrieval task's metric over the shares; what has two or more."""
    pictures = []
    for task in (*found.fidelity[-1:], *found.retrieval[:1]):
        name = "kl" if task.base == FIDELITY else found.headline_name(task.text) or ""
        lines = chosen(by_policy(found, task, name), shares_of(found))
        if lines:
            pictures.append(_draw(lines, task, name, folder))
    return pictures


def chosen(policies: dict[str, dict[float, Metric]], shares: list[float]) -> dict[str, dict[float, Metric]]:
    """The policies that have all ``shares`` and the best means over them, the best first, and the random choice."""
    whole = {policy: row for policy, row in policies.items() if len(row) == len(shares) > 1}
    order = sorted(whole, key=lambda policy: _mean(whole[policy]))
    kept = [policy for policy in order if policy != "random"][:_LINES]
    return {policy: whole[policy] for policy in [*kept, "random"] if policy in whole}


def _mean(row: dict[float, Metric]) -> float:
    """The mean over the shares, less is better."""
    return sum(-metric.value if metric.higher_is_better else metric.value for metric in row.values())


def _draw(lines: dict[str, dict[float, Metric]], task: TaskName, name: str, folder: Path) -> Picture:
    drawn = figure(8.0, 4.6)
    plot = drawn.subplots()
    style = styles(list(lines))
    shares = sorted({share for row in lines.values() for share in row})
    for index, (policy, row) in enumerate(lines.items()):
        # Side by side, because many policies find everything and would lie on one another.
        shift = 1 + 0.015 * (index - (len(lines) - 1) / 2)
        look = style[policy]
        plot.errorbar(
            [share * shift for share in row],
            [metric.value for metric in row.values()],
            yerr=[metric.stderr or 0.0 for metric in row.values()],
            color=look.color,
            marker=look.marker,
            linestyle=look.line,
            linewidth=1.3,
            markersize=5,
            elinewidth=0.8,
            label=policy,
        )
    plot.set_xscale("log")
    plot.xaxis.set_major_locator(FixedLocator(shares))
    plot.xaxis.set_major_formatter(FuncFormatter(lambda share, _: percent_of(float(f"{share:.6g}"))))
    plot.xaxis.set_minor_locator(NullLocator())
    if all(metric.value > 0 and not metric.higher_is_better for row in lines.values() for metric in row.values()):
        plot.set_yscale("log")
    plot.set_xlabel("share of the tokens that is kept")
    plot.set_ylabel(f"{name} ({task.text})")
    legend(drawn, plot)
    file = f"budget_{name}.png"
    save(drawn, folder / file)
    what = (
        f"{code(name)} of {code(task.text)} by the share that is kept. Bars are one standard error. The {_LINES} "
        "policies with the best means over the shares and the random choice; points are set side by side."
    )
    return Picture(file, what)
