"""A report as one HTML page that needs nothing else: pictures inside, no scripts, nothing fetched."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape as escape_markup
from pathlib import Path

from hf_kvcache_eval.report.document import Block, Bullets, Heading, Picture, Table, Text, alternative

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; margin-top: 2em; }
h1 { margin-top: 0; }
h2 { border-bottom: 1px solid #ddd; padding-bottom: .2em; }
code { font: .92em ui-monospace, monospace; background: #f3f3f3; padding: 0 .2em; border-radius: 3px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88em; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; border-bottom: 1px solid #e4e4e4; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #999; }
th:first-child, td:first-child, .wide th, .wide td { text-align: left; }
.wide td { white-space: normal; vertical-align: top; }
tr:hover td { background: #f7f7f7; }
.worse { color: #a33c00; } .better { color: #00614a; } .noise { color: #777; } .reference { color: #0060a0; }
figure { margin: 1.5em 0; } figure img { max-width: 100%; height: auto; }
figcaption { color: #555; font-size: .9em; max-width: 60rem; }
"""


def render(blocks: Sequence[Block], folder: Path, title: str) -> str:
    """The whole page; ``folder`` has the pictures."""
    body = "\n".join(_block(block, folder) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape_markup(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _block(block: Block, folder: Path) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{_inline(item)}</li>" for item in items) + "\n</ul>"
        case Picture(file, caption):
            data = base64.b64encode((folder / file).read_bytes()).decode("ascii")
            image = f'<img alt="{escape_markup(alternative(caption))}" src="data:image/png;base64,{data}">'
            return f"<figure>\n{image}\n<figcaption>{_inline(caption)}</figcaption>\n</figure>"
        case Table():
            return _table(block)


def _table(table: Table) -> str:
    head = "".join(f"<th>{_inline(name)}</th>" for name in table.header)
    rows = "\n".join(
        "<tr>" + "".join(f"<td{_class(entry.mark)}>{_inline(entry.text)}</td>" for entry in row) + "</tr>"
        for row in table.rows
    )
    kind = _class("wide" if table.wide else "")
    return (
        f'<div class="scroll"><table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'
    )


def _class(name: str) -> str:
    return f' class="{escape_markup(name)}"' if name else ""


def _inline(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape_markup(text))
