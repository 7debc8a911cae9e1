"""Sizes as people write them: ``128k`` tokens, ``80GB``, ``3350GB/s``."""

from __future__ import annotations

from hf_kvcache.utils.sizes import BYTES, parsed

_COUNTS = {"": 1, "k": 1024, "m": 1024**2}


def parse_count(name: str, text: str | int) -> int:
    """A number of tokens: ``131072`` or ``"128k"``, where k is 1,024.

    Raises:
        ValueError: if it is no positive whole number of tokens; the error has the ``name`` of the argument.
    """
    value = text if isinstance(text, int) else parsed(text, _COUNTS)
    if value is None or value < 1 or value != int(value):
        raise ValueError(f"{name}={text!r}; accepted: a positive whole number such as 131072 or '128k'")
    return int(value)


def parse_bytes(name: str, text: str | int | float) -> int:
    """A number of bytes: ``"80GB"`` (of 1,000), ``"2 GiB"`` (of 1,024) or a number.

    Raises:
        ValueError: if it is no positive number of bytes; the error has the ``name`` of the argument.
    """
    value = text if isinstance(text, (int, float)) else parsed(text.removesuffix("/s"), BYTES)
    if value is None or not 0 < value < float("inf"):
        raise ValueError(f"{name}={text!r}; accepted: a positive number of bytes such as '80GB' or '2 GiB'")
    return int(value)


def show_bytes(size: float) -> str:
    """A number of bytes in the binary unit that suits it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"
