"""A report as Markdown with tables, which reads the same on GitHub and as a page of mkdocs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hf_kvcache_eval.report.document import Block, Bullets, Heading, Picture, Table, Text, alternative

#: What would be markup; an underscore inside a word is none.
_MARKUP = re.compile(r"[\\*\[\]]|(?<!\w)_|_(?!\w)")
#: Markup that only one of GitHub and mkdocs takes with a backslash in front.
_ENTITIES = str.maketrans({"<": "&lt;", ">": "&gt;", "|": "&#124;", "~": "&#126;"})


def render(blocks: Sequence[Block]) -> str:
    """The whole document, one newline at its end."""
    return "\n\n".join(_block(block) for block in blocks) + "\n"


def escape(text: str) -> str:
    """Text in which nothing but `code` is markup; a bar would end a table's column in code too."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part.replace("|", r"\|") if index % 2 else _MARKUP.sub(r"\\\g<0>", part).translate(_ENTITIES)
        for index, part in enumerate(parts)
    )


def _block(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {escape(text)}"
        case Text(text):
            return escape(text)
        case Bullets(items):
            return "\n".join(f"- {escape(item)}" for item in items)
        case Picture(file, caption):
            return f"![{escape(alternative(caption))}]({file})\n\n{escape(caption)}"
        case Table():
            return _table(block)


def _table(table: Table) -> str:
    aligned = ["---" if table.wide or not index else "---:" for index in range(len(table.header))]
    rows = [[escape(entry.text) for entry in row] for row in table.rows]
    lines = [[escape(name) for name in table.header], aligned, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
