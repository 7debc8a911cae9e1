"""The ready sets of the data folder (``longctx/*.jsonl``), as kinds ``longctx_...``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_kvcache_eval.retrieval.sample import Sample

PREFIX = "longctx_"
#: Kinds, and what stands between context and question.
KINDS = {"longctx_niah_essay": "\n", "longctx_passkey": "\n", "longctx_quote": "\n\n"}


def read_ready(data: Path | None, kind: str, length: int, count: int) -> tuple[list[Sample], str]:
    """The first ``count`` samples of a ready set, and its file's name.

    Raises:
        ValueError: if there is no such set, or it is shorter.
    """
    name = f"longctx/{kind.removeprefix(PREFIX)}_{length}.jsonl"
    if data is None:
        raise ValueError(f"kind={kind!r} is read from {name} of the data folder, and no data folder was given")
    if not (path := data / name).is_file():
        there = sorted(p.name for p in (data / "longctx").glob(f"{kind.removeprefix(PREFIX)}_*.jsonl"))
        raise ValueError(f"length={length!r}: no {name} in the data folder; there are: {', '.join(there) or 'none'}")
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) < count:
        raise ValueError(f"samples={count!r}; {name} has {len(lines)}")
    return [_sample(json.loads(line), KINDS[kind]) for line in lines[:count]], path.name


def _sample(row: dict[str, Any], before: str) -> Sample:
    context, _, question = row["input"].rpartition(before)
    begun = f" {row['gen_prefix']}" if row["gen_prefix"] else ""
    # A continuation begins with the space that the question ends without.
    answers = [answer if begun else f" {answer}" for answer in row["outputs"]]
    return Sample(context, f"{before}{question}{begun}", tuple(answers), row["depth"], row["index"])
