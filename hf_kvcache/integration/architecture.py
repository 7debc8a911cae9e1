"""What the classes of a model do with a cache, read from their code, since a cache is built from a config alone.

A model's modules are found from the ``__init__`` of its class, by the names of the classes that it uses. Nothing is
found out about a model that transformers does not know (with code of its own beside its weights), and nothing is
refused for it.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

#: Name of the method by which a cache is given keys and values.
_STORES = "update"
#: Name of the registry in which a module looks up the attention function that is set.
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_CACHE_ANNOTATION = re.compile(r"\bCache\b")


@dataclass(frozen=True)
class Architecture:
    """The classes of a model's modules.

    Attributes:
        model: the model's own class.
        storing: classes of modules that give keys and values to a cache.
        outside: classes among these that compute attention by themselves, not by the attention function that is set.
        takes_cache: whether any class takes a cache of transformers.
    """

    model: type
    storing: tuple[type, ...]
    outside: tuple[type, ...]
    takes_cache: bool


def architecture(config: PreTrainedConfig) -> Architecture | None:
    """The architecture of models with this ``config``; None if transformers does not know their class."""
    model = model_class(config)
    return None if model is None else _read(model)


def model_class(config: PreTrainedConfig) -> type | None:
    """The class of models with this ``config``, with a language head where transformers names such a class."""
    from transformers.models.auto import modeling_auto

    for mapping in (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_MAPPING):
        found = mapping.get(type(config), None)
        if found is not None:
            return found[0] if isinstance(found, (tuple, list)) else found
    # The config is that of a part of another model, such as the text part of a vision-language model. Its class is the
    # largest class with this config in the modeling file beside the config's.
    names = vars(sys.modules.get(_file_beside(type(config).__module__), object))
    own = [
        cls for cls in names.values() if isinstance(cls, type) and getattr(cls, "config_class", None) is type(config)
    ]
    return max(own, key=lambda cls: len(_made_by(cls)), default=None)


def modeling_file(config: PreTrainedConfig) -> str:
    """Name of the Python module that models with this ``config`` are written in; it can be one of another family."""
    model, config_class = model_class(config), cast(Any, type(config))
    return _file_beside(config_class) if model is None else model.__module__


@cache
def _file_beside(config_file: str) -> str:
    """Name of the modeling file that belongs to a config's file, by the names of both."""
    package, _, name = config_file.rpartition(".")
    file = f"{package}.{name.replace('configuration_', 'modeling_', 1)}"
    with suppress(ImportError):
        importlib.import_module(file)
    return file


def recomputing(config: PreTrainedConfig) -> tuple[int, CodeType] | None:
    """The length after which ``generate`` drops the cache of such models and reads everything again.

    Phi-3 and related models do so when the frequencies of their rotary embedding change with the length.

    Returns:
        The length, and the code that asks the cache for its length and then drops it; None where no cache is dropped.
    """
    name = "original_max_position_embeddings"
    limit, model = getattr(config, name, None), model_class(config)
    prepare = inspect.unwrap(getattr(model, "prepare_inputs_for_generation", None) or recomputing)
    drops = name in prepare.__code__.co_names or name in prepare.__code__.co_consts
    return (limit, prepare.__code__) if model is not None and drops and isinstance(limit, int) else None


@cache
def _read(model: Any) -> Architecture:
    modules: list[Any] = [cls for cls in _made_by(model) if not issubclass(cls, PreTrainedModel)]
    storing = tuple(cls for cls in modules if _STORES in _names_used(cls))
    return Architecture(
        model=model,
        storing=storing,
        outside=tuple(cls for cls in storing if _INTERFACE not in _names_used(cls)),
        takes_cache=any(_takes_cache(cls) for cls in _made_by(model)),
    )


@cache
def _made_by(root: Any) -> tuple[type, ...]:
    """``root``, the classes of modules that its ``__init__`` makes, the classes that these make, and so on."""
    found: dict[Any, None] = {root: None}
    waiting = [root]
    while waiting:
        for function in _making(waiting.pop()):
            for name in _names_in(function.__code__):
                for cls in _classes(function.__globals__.get(name)):
                    if cls not in found:
                        found[cls] = None
                        waiting.append(cls)
    return tuple(found)


def _classes(named: Any) -> list[type]:
    """The class of modules that a global name stands for, or all classes of a table."""
    several = named.values() if isinstance(named, dict) else [named]
    return [cls for cls in several if isinstance(cls, type) and issubclass(cls, torch.nn.Module)]


def _making(cls: type) -> Iterator[FunctionType]:
    """The functions that make the modules of a ``cls``: its ``__init__``, and the methods that ``__init__`` calls."""
    called = {name for function in _functions(cls, "__init__") for name in _names_in(function.__code__)}
    for name in ("__init__", *called):
        yield from _functions(cls, name)


def _functions(cls: type, name: str | None = None) -> Iterator[FunctionType]:
    """The methods of ``cls`` and its bases, except torch's and PreTrainedModel's; with ``name`` only those."""
    for base in cls.__mro__:
        if base.__module__.startswith("torch.") or base in PreTrainedModel.__mro__:
            continue
        for key, member in vars(base).items():
            function = inspect.unwrap(member) if callable(member) else None
            if isinstance(function, FunctionType) and name in (None, key):
                yield function


@cache
def _names_used(cls: Any) -> frozenset[str]:
    return frozenset(name for function in _functions(cls) for name in _names_in(function.__code__))


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names_in(inner)


def _takes_cache(cls: type) -> bool:
    annotations = (a for f in _functions(cls, "forward") for a in f.__annotations__.values())
    return any(_CACHE_ANNOTATION.search(str(annotation)) for annotation in annotations)
