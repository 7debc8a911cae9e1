"""Texts for a calibration: files, or a data set of the hub that is streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path


def from_files(paths: Sequence[str | Path]) -> list[str]:
    """The text of each file (UTF-8)."""
    return [Path(path).read_text(encoding="utf-8") for path in paths]


def from_dataset(name: str, split: str = "train", column: str = "text") -> Iterator[str]:
    """The texts of a data set, streamed one after another.

    Args:
        name: hub id, or hub id and configuration with a colon between them.
        split: split of the data set.
        column: column that holds the text.

    Raises:
        RuntimeError: if the package ``datasets`` is not installed.
        ValueError: if there is no such column.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise RuntimeError("--dataset needs the package datasets; install it with: pip install datasets") from error
    identifier, _, configuration = name.partition(":")
    for row in load_dataset(identifier, configuration or None, split=split, streaming=True):
        if column not in row:
            raise ValueError(f"column={column!r} is none of {name!r}; accepted: {', '.join(row)}")
        yield row[column]
