"""Checks of policies' arguments; each raises a ValueError that names the argument, its value and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def whole(name: str, value: Any, least: int = 1) -> int:
    """``value``, a whole number from ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}; accepted: whole numbers from {least}")
    return value


def odd(name: str, value: int) -> int:
    """``value``, an odd number from 1, so that a pool has a middle."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % 2 == 0:
        raise ValueError(f"{name}={value!r}; accepted: odd numbers from 1")
    return value


def between(name: str, value: float, least: float, most: float) -> float:
    """``value``, a number from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"{name}={value!r}; accepted: numbers from {least} to {most}")
    return value


def flag(name: str, value: bool) -> bool:
    """``value``, True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}; accepted: True, False")
    return value


def one_of(name: str, value: str, accepted: Sequence[str]) -> str:
    """``value``, one of ``accepted``."""
    if value not in accepted:
        raise ValueError(f"{name}={value!r}; accepted: {', '.join(map(repr, accepted))}")
    return value
