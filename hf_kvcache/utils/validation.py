"""Arguments of caches: those that nobody takes are named, with the one that was probably meant."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any


def refuse_unknown(cls: type, given: Iterable[str], options: Mapping[str, Iterable[str]]) -> None:
    """Raise TypeError unless all arguments ``given`` beside those of the constructor are among the ``options``.

    Args:
        cls: whose constructor they were given to.
        given: names of arguments.
        options: names that are accepted too, by what takes them: ``{"codec 'int4'": ["group_size"]}``.
    """
    # In the order of the parameters; `self` and what takes the rest are no names that one could write.
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
    """Those of the arguments that are not None."""
    return {name: value for name, value in arguments.items() if value is not None}
