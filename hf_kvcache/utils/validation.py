"""Checks of arguments. Each error names the argument, the value that was given and the values that are accepted."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any


def whole(name: str, value: Any, least: int = 1) -> int:
    """``value``, a whole number from ``least``; raises ValueError for another."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}; accepted: whole numbers from {least}")
    return value


def odd(name: str, value: int) -> int:
    """``value``, an odd number from 1, so that a pooling window has a middle; raises ValueError for another."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % 2 == 0:
        raise ValueError(f"{name}={value!r}; accepted: odd numbers from 1")
    return value


def between(name: str, value: float, least: float, most: float) -> float:
    """``value``, a number from ``least`` to ``most``; raises ValueError for another."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"{name}={value!r}; accepted: numbers from {least} to {most}")
    return value


def flag(name: str, value: bool) -> bool:
    """``value``, True or False; raises ValueError for anything else."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}; accepted: True, False")
    return value


def one_of(name: str, value: str, accepted: Sequence[str]) -> str:
    """``value``, one of the ``accepted`` strings; raises ValueError for another."""
    if value not in accepted:
        raise ValueError(f"{name}={value!r}; accepted: {', '.join(map(repr, accepted))}")
    return value


def refuse_unknown(cls: type, given: Iterable[str], options: Mapping[str, Iterable[str]]) -> None:
    """Raise TypeError if an argument is neither one of the constructor's own nor one of the ``options``.

    The message says which name was probably meant.

    Args:
        cls: the class whose constructor was called.
        given: names of the arguments that it was called with, beside its own.
        options: names that are accepted too, by what takes them: ``{"codec 'int4'": ["group_size"]}``.
    """
    # In the order of the parameters, without the one that collects the rest: nobody can pass it by name.
    own = [
        name
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    known = {*own, *(name for names in options.values() for name in names)}
    unknown = next((name for name in given if name not in known), None)
    if unknown is None:
        return
    close = get_close_matches(unknown, sorted(known), 1)
    meant = f"; did you mean {close[0]!r}?" if close else "."
    of_others = "".join(f"; of {taker}: {', '.join(names) or 'none'}" for taker, names in options.items())
    raise TypeError(
        f"{cls.__name__} got an unexpected argument {unknown!r}{meant} Accepted: {', '.join(own)}{of_others}"
    )


def given_only(**arguments: Any) -> dict[str, Any]:
    """The arguments that are not None."""
    return {name: value for name, value in arguments.items() if value is not None}


def not_default(cls: type, **arguments: Any) -> dict[str, Any]:
    """The arguments that are not the defaults of the constructor of ``cls``."""
    parameters = inspect.signature(cls).parameters
    return {name: value for name, value in arguments.items() if value != parameters[name].default}
