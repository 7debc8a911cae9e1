"""Sets of samples: the same for the same kind, length, seed, text and tokenizer, on every machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from hf_kvcache.cli.sample_text import packaged_text
from hf_kvcache_eval.retrieval.haystack import Haystack
from hf_kvcache_eval.retrieval.place import Place
from hf_kvcache_eval.retrieval.registry import kinds
from hf_kvcache_eval.retrieval.sample import Sample

#: Raise it when the same arguments give other samples.
VERSION = 1


def samples(
    kind: str, length: int, count: int, seed: int, tokenizer: Any, haystack: Haystack | None = None
) -> list[Sample]:
    """Make a set. A sample does not depend on how many there are, so a longer set begins with the shorter one.

    Args:
        kind: one of :func:`kinds`.
        length: tokens of context, question and answer together, at most; a few less where no sentence fits.
        count: samples.
        seed: another seed gives other facts and other parts of the haystack.
        tokenizer: counts the tokens.
        haystack: the text around; by default the one that the package ships.

    Raises:
        ValueError: for an unknown kind, or a length that leaves no room.
    """
    _check(kind, length, count)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed={seed!r}; accepted: whole numbers")
    if haystack is None:
        haystack = Haystack(*packaged_text(), tokenizer)
    first = Random(f"{kind}/{length}/{seed}").randrange(len(haystack.sentences))
    return [
        kinds()[kind].make(
            Place(
                rng=Random(f"{kind}/{length}/{seed}/{index}"),
                depth=depth(index),
                index=index,
                length=length,
                start=haystack.start(first, index),
                haystack=haystack,
                tokenizer=tokenizer,
            )
        )
        for index in range(count)
    ]


def _check(kind: str, length: int, count: int) -> None:
    """ValueError for what no set can be made of."""
    if kind not in kinds():
        raise ValueError(f"kind={kind!r}; accepted: {', '.join(kinds())}")
    check_count("length", length)
    check_count("count", count)


def check_count(name: str, value: int) -> None:
    """ValueError if ``value`` is no whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}; accepted: whole numbers from 1")


def depth(index: int) -> float:
    """Depths that lie evenly for any number of samples: the bits of the index behind the point, in reverse.

    Sixteen samples lie at 1/32, 3/32, ... 31/32.
    """
    return (int(f"{index % 65_536:016b}"[::-1], 2) / 65_536 + 1 / 32) % 1


def write_jsonl(path: Path, kind: str, length: int, count: int, seed: int, tokenizer: Any) -> None:
    """Write a set, a sample a line, with the fields of :class:`Sample` and the set's ``kind`` and ``length``."""
    made = samples(kind, length, count, seed, tokenizer)
    lines = [json.dumps({**asdict(sample), "kind": kind, "length": length}) for sample in made]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
