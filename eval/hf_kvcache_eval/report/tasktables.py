"""A table for every task, with each cache's difference to its reference and what that is worth."""

from __future__ import annotations

from hf_kvcache_eval.cells import Cell, Metric
from hf_kvcache_eval.report.compare import Difference, difference
from hf_kvcache_eval.report.costs import cost_columns
from hf_kvcache_eval.report.document import BLANK, Block, Entry, Heading, Table, Text, code, quoted
from hf_kvcache_eval.report.formats import difference_entries, metric_entry, number, percent
from hf_kvcache_eval.report.headline import by_bytes
from hf_kvcache_eval.report.load import FIDELITY, SPEED, Comparison
from hf_kvcache_eval.report.names import FULL, TaskName, is_full, is_noise_floor
from hf_kvcache_eval.report.ranking import legend, ranking

#: More caches than this are ranked by the shares that they keep, not all in one line.
_RANKED = 60


def task_sections(found: Comparison) -> list[Block]:
    """A heading, a table and remarks for each task that any cache finished."""
    blocks: list[Block] = []
    for task in found.tasks:
        if task.base == SPEED or not found.headline_name(task.text):
            continue
        table = fidelity_table(found, task) if task.base == FIDELITY else task_table(found, task)
        blocks += [Heading(3, quoted(task.text)), table, *_remarks(found, task)]
    signs = legend(block.text for block in blocks if isinstance(block, Text))
    return [Heading(2, "Tasks"), Text(signs), *blocks] if blocks else []


def task_table(found: Comparison, task: TaskName) -> Table:
    """Metrics with standard errors; the headline metric's difference to the full cache, and its verdict."""
    names, headline = _metric_names(found, task), found.headline_name(task.text) or ""
    against = found.metric(FULL, task.text, headline)
    costs = cost_columns(found, found.caches)
    columns = [f"{headline} − {FULL}", "verdict", "compressed", *(cost.column for cost in costs)]
    table = Table(["cache", *(_titled(found, task, name) for name in names), *columns])
    for cell in _by_bytes(found, task):
        compared = None if is_full(cell.cache) else _difference(cell.metrics.get(headline), against)
        table.add(
            _name(cell),
            *(metric_entry(cell.metrics.get(name)) for name in names),
            *difference_entries(compared),
            _compressed(cell),
            *(cost.text(found, cell.cache) for cost in costs),
        )
    return table.without_empty_columns()


def fidelity_table(found: Comparison, task: TaskName) -> Table:
    """As :func:`task_table`; KL is compared with the noise floor's, ΔNLL (a difference already) with zero."""
    names, floor = _metric_names(found, task), found.noise_floor
    against = found.metric(floor, task.text, "kl") if floor else None
    costs = cost_columns(found, found.caches)
    columns = ["KL − noise floor", "verdict on KL", "verdict on ΔNLL", *(cost.column for cost in costs)]
    table = Table(["cache", *(_titled(found, task, name) for name in names), *columns])
    for cell in _by_bytes(found, task):
        own = is_full(cell.cache) or cell.cache == floor
        delta = cell.metrics.get("delta_nll")
        table.add(
            _name(cell),
            *(metric_entry(cell.metrics.get(name)) for name in names),
            *difference_entries(None if own else _difference(cell.metrics.get("kl"), against)),
            difference_entries(None if is_full(cell.cache) else _difference(delta, _zero(delta)))[1],
            *(cost.text(found, cell.cache) for cost in costs),
        )
    return table.without_empty_columns()


def speed_section(found: Comparison) -> list[Block]:
    """Milliseconds a token, where they were taken."""
    task = found.speed_task
    if task is None:
        return []
    table = Table(["cache", "ms a token", "quartiles", f"× {FULL}", "prefill, s", "compression, ms", "bytes"])
    full = found.time(FULL, task)
    for cache in by_bytes(found):
        time, memory = found.time(cache, task), found.memory(cache, task)
        if time is None:
            continue
        table.add(
            code(cache),
            number(time.median),
            f"{number(time.low)} to {number(time.high)}" if time.low < time.high else BLANK,
            number(time.median / full.median) if full else BLANK,
            number(time.prefill),
            number(None if time.compress is None else 1e3 * time.compress),
            percent(memory.ratio_bf16 if memory else None),
        )
    note = f"{code(task)}: the median over what was timed, and its quartiles."
    return [Heading(2, "Speed"), table.without_empty_columns(), Text(note)]


def _by_bytes(found: Comparison, task: TaskName) -> list[Cell]:
    return [cell for cache in by_bytes(found) if (cell := found.cell(cache, task.text)) is not None]


def _metric_names(found: Comparison, task: TaskName) -> list[str]:
    return list(dict.fromkeys(name for cell in found.on(task.text) for name in cell.metrics))


def _titled(found: Comparison, task: TaskName, name: str) -> str:
    """The metric's name with an arrow to where it is good."""
    metric = next(cell.metrics[name] for cell in found.on(task.text) if name in cell.metrics)
    return f"{quoted(name)} {'↑' if metric.higher_is_better else '↓'}"


def _name(cell: Cell) -> Entry:
    return Entry(code(cell.cache), "reference" if is_full(cell.cache) or is_noise_floor(cell.cache) else "")


def _difference(metric: Metric | None, against: Metric | None) -> Difference | None:
    return None if metric is None or against is None else difference(metric, against)


def _zero(metric: Metric | None) -> Metric | None:
    return metric and Metric(0.0, 0.0, metric.higher_is_better, samples=[0.0] * len(metric.samples))


def _compressed(cell: Cell) -> str:
    share = cell.protocol.get("compressed_share")
    return percent(share) if isinstance(share, int | float) else BLANK


def _remarks(found: Comparison, task: TaskName) -> list[Block]:
    """What the table does not say by itself: which neighbors are told apart, and that nothing was compressed."""
    name = "kl" if task.base == FIDELITY else found.headline_name(task.text)
    metrics = {cell.cache: cell.metrics[name] for cell in found.on(task.text) if name in cell.metrics}
    if task.base == FIDELITY:
        metrics = {cache: metric for cache, metric in metrics.items() if not is_full(cache)}
    ranked = [Text(f"By {code(name or '')}: {ranking(metrics)}")] if 1 < len(metrics) <= _RANKED else []
    return [*ranked, *(_not_compressed(found, task) if task.base != FIDELITY else [])]


def _not_compressed(found: Comparison, task: TaskName) -> list[Block]:
    """A warning where contexts are so short that nothing was compressed."""
    shares = [cell.protocol.get("compressed_share") for cell in found.on(task.text)]
    if not shares or any(share != 0 for share in shares):
        return []
    return [Text("No token of this task was compressed: its contexts fit into sinks and tail.")]
