"""Sizes as people write them: ``128k``, ``80GB``, ``2 GiB``."""

from __future__ import annotations

import re
from collections.abc import Mapping

_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)
#: Bytes by their units in lower case: of 1,000 (``gb``) and of 1,024 (``gib``).
BYTES = {"": 1, "b": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("kmgt", 1)
    for unit, base in (("b", 1000), ("ib", 1024))
}


def parsed(text: str, units: Mapping[str, int]) -> float | None:
    """A number with one of the ``units``, which are in lower case; None if the text is something else."""
    found = _NUMBER.fullmatch(text)
    unit = units.get(found[2].lower()) if found else None
    return None if found is None or unit is None else float(found[1]) * unit
