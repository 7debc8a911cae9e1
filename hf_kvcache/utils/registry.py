"""Classes by name: a new one is one file in a package, whose class carries a decorator."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

Entry = TypeVar("Entry")
Named = TypeVar("Named", bound=type)


class Registry(Generic[Entry]):
    """What the modules of one package have registered. They are imported when the registry is first asked.

    Args:
        package: its dotted name.
    """

    def __init__(self, package: str) -> None:
        self._package = package
        self._entries: dict[str, Entry] = {}
        self._imported = False

    def add(self, name: str, entry: Entry) -> None:
        """Make ``entry`` known under ``name``."""
        self._entries[name] = entry

    def all(self) -> dict[str, Entry]:
        """Every entry by its name, sorted."""
        if not self._imported:
            # By name, so that a registry does not depend on the modules that depend on it.
            for module in pkgutil.iter_modules(importlib.import_module(self._package).__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            self._imported = True
        return dict(sorted(self._entries.items()))


def registers(registry: Registry[type], name: str) -> Callable[[Named], Named]:
    """Class decorator: set the attribute ``name`` of a class, and make the class known under it."""

    def decorate(cls: Named) -> Named:
        cls.name = name  # type: ignore[attr-defined]
        registry.add(name, cls)
        return cls

    return decorate
