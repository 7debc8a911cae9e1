"""Summarizes the verdicts of all modes in one cell of the table."""

from __future__ import annotations

import re
from typing import NamedTuple

from tests.model_families.runner import BUILDING
from tests.model_families.trial import CONSTRUCTION, Results
from tests.model_families.verdicts import CRASHED, DENSE, NOT_TRIED, REFUSED, WORKS, WRONG, Verdict


class Cell(NamedTuple):
    """How a cache works with a family: a status, the modes that are refused although it works, and the reason."""

    status: str
    refused: tuple[str, ...] = ()
    note: str = ""


def cell(modes: dict[str, Verdict]) -> Cell:
    """The worst verdict over all modes."""
    for status in (CRASHED, WRONG):
        bad = {name: verdict for name, verdict in modes.items() if verdict.status == status}
        if bad:
            return Cell(status, tuple(bad), next(iter(bad.values())).note)
    tried = {name: verdict for name, verdict in modes.items() if name != "afterwards" and verdict.status != NOT_TRIED}
    refused = {name: verdict for name, verdict in tried.items() if verdict.status == REFUSED}
    note = next((verdict.note for verdict in refused.values()), "")
    if not tried:
        return Cell(NOT_TRIED, note=next((v.note for v in modes.values() if v.note), ""))
    if len(refused) == len(tried):
        return Cell(REFUSED, note=note)
    dense = any(verdict.status == DENSE for verdict in tried.values())
    return Cell(DENSE if dense else WORKS, tuple(refused), note)


def cells(results: Results) -> dict[str, Cell]:
    """A cell for each cache, or a single cell if the model could not be built."""
    return {kind: cell(modes) for kind, modes in results.items()}


def is_built(results: Results) -> bool:
    """Whether the model could be built."""
    return BUILDING not in results


def short(note: str) -> str:
    """A reason without names of the family, so that equal reasons are counted once."""
    note = re.sub(r"config of '[^']*'", "config", note)
    note = re.sub(r"the '[^']*' model whose", "the model whose", note)
    note = re.sub(
        r"shape \[[^\]]*\]|heads \[[^\]]*\]|dim \[[^\]]*\]", lambda match: match[0].split(" ")[0] + " […]", note
    )
    note = re.sub(r"\b[A-Z]\w+RotaryEmbedding", "the rotary embedding", note)
    note = re.sub(r"\b[A-Z]\w+For[A-Z]\w+|\b[A-Z]\w+LMHeadModel\b", "the model", note)
    note = re.sub(r"for a '[^']*' model", "for this model", note)
    note = re.sub(r"policy=(\w+)\([^)]*\)", r"policy=\1", note)
    note = re.sub(r"\b[A-Z]\w*(Attention|Attn)\w*", "the attention module", note)
    return note if len(note) < 240 else note[:237] + "…"


__all__ = ["CONSTRUCTION", "Cell", "cell", "cells", "is_built", "short"]
