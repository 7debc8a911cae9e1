"""The hidden states that attention modules are given, for caches whose policy scores tokens by them.

A cache sees keys and values only. A hook on each attention module hands its hidden states to the layer of the cache
that the module is called with, before the layer gets the keys. One hook serves all caches and keeps nothing. Since a
cache is built from a config, the modules are not known before a model with this config is called for the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary, finalize, ref

import torch
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_kvcache.integration.versions import CACHE_NAMES

#: By the id of a config, which its listener keeps alive.
_listeners: WeakValueDictionary[int, HiddenStates] = WeakValueDictionary()


class HiddenStates:
    """Hooks on the attention modules of the models with one config, for as long as a cache needs them.

    Every cache that needs hidden states keeps a reference. With the last of them the hooks go. A copy of a model
    (``copy.deepcopy``) takes copies of the hooks along, which do nothing without such a cache.

    Args:
        config: the config that the attention modules hold.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self._handles: list[RemovableHandle] = []
        self._search: list[RemovableHandle] = []
        finalize(self, _remove, self._handles, self._search).atexit = False

    def look_for_model(self) -> None:
        """Look at every module that is called until it is a model with the config, and attach the hooks to it."""
        if not self._search:
            self._search.append(register_module_forward_pre_hook(_finder(ref(self))))

    def attach(self, model: torch.nn.Module) -> None:
        """Let the attention modules of ``model`` hand on their hidden states."""
        for module in _attention_modules(model, self.config):
            if _hand_on not in module._forward_pre_hooks.values():
                self._handles.append(module.register_forward_pre_hook(_hand_on, with_kwargs=True))
        _remove(self._search)


def listen(config: PreTrainedConfig) -> HiddenStates:
    """Hand the hidden states of attention modules to caches, from the next call of a model with this ``config`` on.

    Returns:
        What the cache has to keep for as long as it needs hidden states.
    """
    found = _listeners.get(id(config))
    if found is None:
        found = _listeners[id(config)] = HiddenStates(config)
    found.look_for_model()
    return found


@contextmanager
def recorded(model: Any, record: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """While it is open, ``record`` gets the index of each layer that runs and the hidden states of its attention.

    The model has to be called with a cache.
    """

    def see(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        # A router of experts may know its layer and config too, but is given no cache.
        if isinstance(hidden, torch.Tensor) and _cache_of(kwargs) is not None:
            record(_index(module), hidden)

    config = model.config.get_text_config(decoder=True)
    handles = [x.register_forward_pre_hook(see, with_kwargs=True) for x in _attention_modules(model, config)]
    try:
        yield
    finally:
        _remove(handles)


def _attention_modules(model: torch.nn.Module, config: Any) -> Iterator[torch.nn.Module]:
    """The modules inside the layers of a model's decoder that hold its config: attention, and perhaps others."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            continue  # a whole layer (Gemma 3), which is given the state before its norm
        if getattr(module, "config", None) is config and isinstance(_index(module), int):
            yield module


def _finder(listener: ref[HiddenStates]) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
    def find(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if not isinstance(module, PreTrainedModel):
            return
        found = listener()
        if found is not None and module.config.get_text_config(decoder=True) is found.config:
            found.attach(module)

    return find


def _hand_on(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Hand the hidden states of an attention module to the layer of its cache, if that takes them."""
    if is_dynamo_compiling():
        return  # the layer says that it has got none
    layers, index = getattr(_cache_of(kwargs), "layers", ()), _index(module)
    if isinstance(index, int) and index < len(layers):
        see = getattr(layers[index], "see_hidden", None)
        if see is not None:
            see(module, kwargs.get("hidden_states", args[0] if args else None))


def _cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache that a module is called with; None if there is none."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def _index(module: torch.nn.Module) -> Any:
    return getattr(module, "layer_idx", None)


def _remove(*handles: list[RemovableHandle]) -> None:
    for some in handles:
        while some:
            some.pop().remove()
