"""The plot of quality against bytes, and a page with it that opens without a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean, median
from typing import Any

from hf_kvcache.cli.compare_measure import Compared

CAPTION = (
    "KL, same top token: against the full cache, each token decoded through the compressed one. "
    "Bytes: held behind the last token. Times: medians."
)
#: Divergences below it are drawn at it: they are rounding of float32, and zero has no place on a logarithmic axis.
_FLOOR = 1e-7
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border-bottom: 1px solid #ccc; padding: .3em .8em; text-align: right; }
th { white-space: pre-line; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
"""


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        heading: its heading, on two lines.
        cell: makes the text of a row's cell.
        wide: whether only the page has it: a terminal of 80 characters has no room for all.
    """

    heading: str
    cell: Callable[[Compared], str]
    wide: bool = False


COLUMNS = (
    Column("\ncache", lambda row: row.name),
    Column("KL\nnats", lambda row: f"{fmean(row.kl):.5f}"),
    Column("±\nnats", lambda row: "" if row.kl_error is None else f"{row.kl_error:.5f}", wide=True),
    Column("same\ntop", lambda row: f"{fmean(row.same):.1%}"),
    Column("NLL\nnats", lambda row: f"{fmean(row.nll):.3f}", wide=True),
    Column("held\nMiB", lambda row: f"{fmean(row.bytes) / 2**20:.2f}"),
    Column("of\nfull", lambda row: f"{row.share:.0%}"),
    Column("token\nms", lambda row: f"{median(row.token_ms):.1f}"),
    Column("prefix\ns", lambda row: f"{median(row.prompt_ms) / 1e3:.1f}"),
    Column("\nwindows", lambda row: f"{row.windows}", wide=True),
)


def picture(rows: Sequence[Compared], kind: str = "png") -> bytes:
    """KL against bytes, one point for each cache but the full one, as a picture of this kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for row in rows[1:]:
        x, y = 100 * row.share, max(fmean(row.kl), _FLOOR)
        # On a logarithmic axis a bar must not reach zero.
        bar = None if row.kl_error is None else [[min(row.kl_error, 0.9 * y)], [row.kl_error]]
        axes.errorbar(x, y, yerr=bar, marker="o", capsize=3, linestyle="none")
        axes.annotate(row.name, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=9)
    axes.set_yscale("log")
    axes.margins(x=0.2, y=0.1)
    axes.set_xlim(left=0)
    axes.set(xlabel="bytes held, % of the full cache", ylabel="KL to the full cache, nats a token")
    axes.grid(True, alpha=0.3)
    out = io.BytesIO()
    figure.savefig(out, format=kind, dpi=110)
    return out.getvalue()


def page(rows: Sequence[Compared], facts: dict[str, Any]) -> str:
    """A page of HTML with the table, the plot inside it, and what was measured where."""
    image = base64.b64encode(picture(rows)).decode()
    head = "".join(f"<th>{escape(column.heading.lstrip())}</th>" for column in COLUMNS)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(column.cell(row))}</td>" for column in COLUMNS) + "</tr>" for row in rows
    )
    machine, versions = facts["machine"], facts["versions"]
    where = [
        f"{machine.get('gpu') or machine['cpu']}, {machine['threads']} threads",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        facts["date"],
    ]
    title = f"{facts['model']} on {facts['text']}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style></head>
<body>
<h1>{escape(title)}</h1>
<p>{facts["windows"]} windows of {facts["prefix"]:,} tokens that are read and compressed, and {facts["suffix"]:,} that
are decoded behind them; the model is in {escape(facts["dtype"])}. {escape(CAPTION)}
NLL: of the text itself. ±: standard error over windows.</p>
<table><thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table>
<p><img alt="KL to the full cache against bytes held" src="data:image/png;base64,{image}"></p>
<p>{"<br>".join(map(escape, where))}</p>
</body>
</html>
"""
