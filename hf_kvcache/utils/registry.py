"""Registries of classes by name. A new class is one file in a package, with a decorator."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

Entry = TypeVar("Entry")
Named = TypeVar("Named", bound=type)


class Registry(Generic[Entry]):
    """Entries that the modules of one package register. The modules are imported when the registry is first read.

    Args:
        package: dotted name of the package.
    """

    def __init__(self, package: str) -> None:
        self._package = package
        self._entries: dict[str, Entry] = {}
        self._imported = False

    def add(self, name: str, entry: Entry) -> None:
        """Register ``entry`` under ``name``."""
        self._entries[name] = entry

    def all(self) -> dict[str, Entry]:
        """All entries by name, sorted."""
        if not self._imported:
            # By name, so that a registry does not depend on the modules that depend on it.
            for module in pkgutil.iter_modules(importlib.import_module(self._package).__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            self._imported = True
        return dict(sorted(self._entries.items()))


def registers(registry: Registry[type], name: str) -> Callable[[Named], Named]:
    """Class decorator that sets the attribute ``name`` of a class and registers the class under it."""

    def decorate(cls: Named) -> Named:
        cls.name = name  # type: ignore[attr-defined]
        registry.add(name, cls)
        return cls

    return decorate
