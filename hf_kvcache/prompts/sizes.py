"""Budgets in bytes, as numbers or as text."""

from __future__ import annotations

from hf_kvcache.utils.sizes import BYTES, parsed


def size(name: str, value: int | str) -> int:
    """A number of bytes from a whole number or a text such as ``"2 GiB"``; raises ValueError for anything else."""
    found: float | None = None
    if isinstance(value, str):
        found = parsed(value, BYTES)
    elif isinstance(value, int) and not isinstance(value, bool):
        found = value
    if found is None or found < 1:
        raise ValueError(f"{name}={value!r}; accepted: bytes as a whole number from 1, or text such as '2 GiB'")
    return int(found)
