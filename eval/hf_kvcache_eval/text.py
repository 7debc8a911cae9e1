"""Long texts to measure on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hf_kvcache.cli.sample_text import packaged_text

if TYPE_CHECKING:
    from hf_kvcache_eval.task import Bench

WIKITEXT = "wikitext2/wiki.test.raw"
WALDEN = "longtext/walden.txt"


def read_text(data: Path | None, file: str) -> tuple[str, str]:
    """``file`` of the data folder and its name; where there is none, the text that the package ships."""
    if data is not None and (path := data / file).is_file():
        return path.read_text(encoding="utf-8"), path.name
    return packaged_text()


def running_text(bench: Bench) -> tuple[torch.Tensor, str]:
    """The text that windows are taken from, as tokens ``[T]``, and its name; tokenized once for all tasks."""
    key = ("tokens",)
    if key not in bench.memo:
        text, name = read_text(bench.data, WIKITEXT)
        bench.memo[key] = bench.tokenizer(text, return_tensors="pt", verbose=False).input_ids[0], name
    return bench.memo[key]


def text_windows(bench: Bench, length: int, most: int) -> torch.Tensor:
    """Up to ``most`` windows ``[n, length]`` that lie evenly in the text and do not overlap.

    Raises:
        ValueError: if the text is shorter than one window.
    """
    tokens, name = running_text(bench)
    if len(tokens) < length:
        raise ValueError(f"{name} has {len(tokens)} tokens; one window takes {length}")
    count = min(most, len(tokens) // length)
    starts = torch.linspace(0, len(tokens) - length, count).long().tolist()
    return torch.stack([tokens[start : start + length] for start in starts])
