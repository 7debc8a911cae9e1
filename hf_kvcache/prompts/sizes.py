"""Budgets in bytes, as numbers or as text."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def size(name: str, value: int | str) -> int:
    """A number of bytes from a whole number or a text such as ``"2 GiB"``; raises ValueError for anything else."""
    found = None
    if isinstance(value, int) and not isinstance(value, bool):
        found = value
    elif isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)):
        unit = next((bytes_ for unit, bytes_ in _UNITS.items() if unit.lower() == match[2].lower()), None)
        found = None if unit is None else int(float(match[1]) * unit)
    if found is None or found < 1:
        raise ValueError(f"{name}={value!r}; accepted: bytes as a whole number from 1, or text such as '2 GiB'")
    return found
