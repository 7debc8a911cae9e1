"""Differences between the releases of transformers that this package supports. No other module lists such names.

Everything is found from signatures and attributes of transformers, never by comparing version numbers. So a release
that was not tested is treated by what it does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import transformers
from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.masking_utils import create_causal_mask
from transformers.utils import output_capturing

#: What the model that runs collects of its modules' outputs: names, or nothing.
COLLECTOR = output_capturing._active_collector
#: The release that is installed.
RELEASE: str = transformers.__version__

#: Names that `generate` and the models have had for the argument that takes a cache, the newest first.
CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")

#: The name in this release: ``"cache"`` from 5.24 on, ``"past_key_values"`` before.
CACHE_ARGUMENT: str = next(name for name in CACHE_NAMES if name in inspect.signature(create_causal_mask).parameters)


def cache_argument(model: Any) -> str:
    """The name under which a model's ``forward`` takes its cache.

    A model from outside of transformers may still use an older name than the release's own models.
    """
    return _cache_argument(type(model).forward)


@cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    takes = inspect.signature(forward).parameters
    return next((name for name in (CACHE_ARGUMENT, *CACHE_NAMES) if name in takes), CACHE_ARGUMENT)


def with_cache(model: Any, held: Any) -> dict[str, Any]:
    """The keyword argument that gives a model the cache ``held``: ``model(ids, **with_cache(model, held))``."""
    return {cache_argument(model): held}


def cache_of(output: Any) -> Any:
    """The cache in the output of a model or of ``generate``; None if there is none."""
    return getattr(output, CACHE_ARGUMENT, None)


#: Types of layers whose cache takes a ``sliding_window``. For chunked attention this is the length of a chunk.
_WINDOWED = ("sliding_attention", "hybrid_sliding", "chunked_attention")


def layer_types(config: PreTrainedConfig) -> tuple[list[str], list[dict[str, Any]]]:
    """Type and constructor arguments of each layer, as transformers' own caches use them."""
    types, arguments = get_layer_types_and_kwargs(config)
    if isinstance(arguments, dict):  # before 5.19: one set of arguments for all layers
        arguments = [
            {name: x for name, x in arguments.items() if name != "sliding_window" or kind in _WINDOWED}
            for kind in types
        ]
    return types, arguments


def collects_attentions(collected: Any) -> bool:
    """Whether the model that runs collects the attention weights that its modules return.

    Args:
        collected: what :data:`COLLECTOR` holds; empty or None where nothing is collected.
    """
    return any("attentions" in name for name in collected)


_asked: WeakKeyDictionary[type, str] = WeakKeyDictionary()


def ask_with_cache(module: Any, given: dict[str, Any], stand_in: Any, answer: type[BaseException]) -> None:
    """Call ``module.forward`` with ``stand_in`` in place of its cache, whatever the parameter is called.

    The parameter is found by trying all candidates: it is the one whose object's ``update`` is called.

    Args:
        module: an attention module.
        given: the other arguments; those that the module does not have are left out.
        stand_in: an object whose ``update`` raises ``answer``.
        answer: the exception that this function passes on when the parameter is found.

    Raises:
        RuntimeError: if the module calls ``update`` on none of its arguments.
    """
    # The module itself is not called: its hooks would see states that are not the model's.
    forward: Callable[..., Any] = module.forward
    takes = inspect.signature(forward).parameters
    arguments = {name: value for name, value in given.items() if name in takes}
    failed: Exception | None = None
    for name in _candidates(type(module), takes, arguments):
        try:
            forward(**arguments, **{name: stand_in})
        except answer:
            _asked[type(module)] = name
            raise
        except Exception as error:  # the parameter takes something else, or the module fails for another reason
            failed = failed or error
    if failed is not None:
        raise failed
    raise RuntimeError("it writes nothing to a cache")


def _candidates(cls: type, takes: Any, arguments: dict[str, Any]) -> Iterator[str]:
    """Parameters that may take the cache: the one found before, or first those with known names, then all others."""
    if cls in _asked:
        yield _asked[cls]
        return
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    free = [name for name, parameter in takes.items() if parameter.kind in named and name not in arguments]
    yield from sorted(free, key=lambda name: CACHE_NAMES.index(name) if name in CACHE_NAMES else len(CACHE_NAMES))
