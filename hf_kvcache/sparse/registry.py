"""Finding selectors by name. A new selector is one file in ``selectors/``, whose class carries ``@register``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from hf_kvcache.sparse.base import Selector
from hf_kvcache.utils.registry import Named, Registry, registers

_SELECTORS: Registry[type[Selector]] = Registry("hf_kvcache.sparse.selectors")


def register(name: str) -> Callable[[Named], Named]:
    """Class decorator that registers a selector under ``name``."""
    return registers(_SELECTORS, name)


def available() -> list[str]:
    """The names of the registered selectors, sorted."""
    return list(_SELECTORS.all())


def registered() -> dict[str, type[Selector]]:
    """The registered selectors by name."""
    return _SELECTORS.all()


def option_names(selector: str | Selector) -> list[str]:
    """The options that :func:`resolve` takes for ``selector``; raises as it does."""
    return [] if isinstance(selector, Selector) else list(_parameters(_found(selector)))


def resolve(selector: str | Selector, **options: Any) -> Selector:
    """A selector by its name.

    Args:
        selector: a registered name, or a selector that has been made.
        **options: options of the selector.

    Raises:
        ValueError: for a selector that does not exist, an option out of range, or options beside a ready selector.
        TypeError: for an option that the selector does not have.
    """
    if isinstance(selector, Selector):
        if options:
            raise ValueError(f"selector={selector!r} is ready-made: {', '.join(options)} cannot be given beside it")
        return selector
    found = _found(selector)
    known = _parameters(found)
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"selector {selector!r} has no option {unknown[0]!r}; accepted: {', '.join(known) or 'none'}")
    return found(**options)


def _found(selector: Any) -> type[Selector]:
    found = _SELECTORS.all().get(selector) if isinstance(selector, str) else None
    if found is None:
        raise ValueError(f"selector={selector!r} is not known; accepted: {', '.join(available())}")
    return found


def _parameters(selector: type[Selector]) -> list[str]:
    # A class without a constructor of its own would show Python's, which takes anything.
    return [] if selector.__init__ is object.__init__ else list(inspect.signature(selector).parameters)
