"""Finding methods by name. A new method is one file in this folder, whose class is decorated with ``@register``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from hf_kvcache.lowrank.methods.base import Method
from hf_kvcache.utils.registry import Named, Registry, registers

_METHODS: Registry[type[Method]] = Registry("hf_kvcache.lowrank.methods")


def register(name: str) -> Callable[[Named], Named]:
    """Class decorator that registers a method under ``name``."""
    return registers(_METHODS, name)


def available() -> list[str]:
    """The names of the registered methods, sorted."""
    return list(_METHODS.all())


def resolve(method: str | Method, **options: Any) -> Method:
    """A method by its name.

    Args:
        method: a registered name, or a method that has been made.
        **options: options of the method.

    Raises:
        ValueError: for a method or an option that does not exist, or an option out of range.
    """
    if isinstance(method, Method):
        if options:
            raise ValueError(f"method={method.name!r} is ready-made: options cannot be given beside it")
        return method
    found = _METHODS.all().get(method) if isinstance(method, str) else None
    if found is None:
        raise ValueError(f"method={method!r} is not known; accepted: {', '.join(available())}")
    known = list(inspect.signature(found).parameters)
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"method {method!r} has no option {unknown[0]!r}; accepted: {', '.join(known) or 'none'}")
    return found(**options)
