"""Drafts (prompt lookup, assisted decoding) for models of which transformers says that they cannot go back.

Such a class has the attribute ``_is_stateful``, by which ``generate`` refuses drafts. It means the model's own cache.
While ``generate`` runs with a cache that can take drafts back, the attribute is False here.
"""

from __future__ import annotations

import functools
import sys
from contextvars import ContextVar
from typing import Any

from transformers import GenerationMixin

from hf_kvcache.integration.versions import CACHE_NAMES

_STATEFUL = "_is_stateful"
_GENERATE = "generate"
#: Whether the call of ``generate`` that runs has a cache that takes drafts back.
_takes_back: ContextVar[bool] = ContextVar("hf_kvcache_takes_back", default=False)


class _Stateful:
    """The attribute of a class. What is set on a model itself goes before it."""

    def __get__(self, model: Any, owner: type) -> bool:
        return not _takes_back.get()


def wrap(file: str) -> None:
    """Let the models of an imported module have drafts with caches that take them back.

    Args:
        file: name of the Python module that defines the models.
    """
    stateful = _stateful_classes(file)
    for cls in stateful:
        if vars(cls)[_STATEFUL] is True:
            setattr(cls, _STATEFUL, _Stateful())
    for cls in _classes(file):
        if issubclass(cls, GenerationMixin) and issubclass(cls, stateful) and _GENERATE not in vars(cls):
            setattr(cls, _GENERATE, _wrapped(cls))


def unwrap(file: str) -> None:
    """Undo :func:`wrap`."""
    for cls in _stateful_classes(file):
        if isinstance(vars(cls)[_STATEFUL], _Stateful):
            setattr(cls, _STATEFUL, True)
    for cls in _classes(file):
        if getattr(vars(cls).get(_GENERATE), "_hf_kvcache", False):
            delattr(cls, _GENERATE)


def _classes(file: str) -> list[type]:
    """The classes of an imported module; none if it was not imported."""
    return [cls for cls in list(vars(sys.modules.get(file, object)).values()) if isinstance(cls, type)]


def _stateful_classes(file: str) -> tuple[type, ...]:
    """The classes of a module that say themselves that their models cannot go back."""
    own = {cls: vars(cls).get(_STATEFUL) for cls in _classes(file) if cls.__module__ == file}
    return tuple(cls for cls, says in own.items() if says is True or isinstance(says, _Stateful))


def _wrapped(cls: Any) -> Any:
    @functools.wraps(getattr(cls, _GENERATE))
    def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
        given = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        layers = getattr(given, "layers", [])
        before = _takes_back.set(bool(layers) and all(getattr(layer, "takes_back_drafts", False) for layer in layers))
        try:
            return super(cls, model).generate(*args, **kwargs)
        finally:
            _takes_back.reset(before)

    generate._hf_kvcache = True  # type: ignore[attr-defined]
    return generate
