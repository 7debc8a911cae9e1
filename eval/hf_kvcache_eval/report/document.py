"""A report before it is Markdown or HTML: a list of blocks.

In texts, `code` stands between backticks; everything else is shown as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Heading:
    """A heading of level 1 to 4."""

    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: list[str]


@dataclass(frozen=True)
class Picture:
    """A PNG beside the report.

    Attributes:
        file: its name.
        caption: what it shows; its first sentence also stands for the picture where that cannot be seen.
    """

    file: str
    caption: str


@dataclass(frozen=True)
class Entry:
    """One place in a table.

    Attributes:
        text: what stands there.
        mark: a word that HTML colors: ``worse``, ``better``, ``noise`` or ``reference``.
    """

    text: str
    mark: str = ""


@dataclass
class Table:
    """Rows under a header; the first column is a name, the others are aligned to the right.

    Attributes:
        header: the columns' names.
        rows: one entry a column.
        wide: texts rather than numbers: every column is aligned to the left.
    """

    header: list[str]
    rows: list[list[Entry]] = field(default_factory=list)
    wide: bool = False

    def add(self, *entries: Entry | str) -> None:
        """Append a row.

        Raises:
            ValueError: if it has not as many entries as the header.
        """
        if len(entries) != len(self.header):
            raise ValueError(f"{len(entries)} entries in a table of {len(self.header)} columns")
        self.rows.append([entry if isinstance(entry, Entry) else Entry(entry) for entry in entries])

    def without_empty_columns(self) -> Table:
        """The table without the columns that hold nothing but blanks; the first one stays."""
        kept = [
            i for i in range(len(self.header)) if i == 0 or any(row[i].text not in ("", BLANK) for row in self.rows)
        ]
        return Table([self.header[i] for i in kept], [[row[i] for i in kept] for row in self.rows], self.wide)


#: Stands where there is no number.
BLANK = "–"
Block = Heading | Text | Bullets | Picture | Table


def code(text: str) -> str:
    """``text`` as code."""
    return f"`{quoted(text)}`"


def quoted(text: str) -> str:
    """Text from outside, on one line and without backticks, which would start code."""
    return " ".join(text.replace("`", "'").split())


def alternative(caption: str) -> str:
    """A caption's first sentence without markup."""
    return caption.partition(". ")[0].replace("`", "").rstrip(".") + "."
