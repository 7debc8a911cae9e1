"""A model on the ``meta`` device: how many bytes its weights are, and what its layers give to a cache.

Two short passes of different sizes through the real model show the arguments of every call to every layer of the cache.
A dimension that grows by as much as the batch is the batch (and a number), one that grows as the tokens do is theirs,
and one that grows by a part of that is one of every so many tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from hf_kvcache.cache.compressed_config import compresses
from hf_kvcache.cache.memory import layer_report
from hf_kvcache.integration.architecture import model_class
from hf_kvcache.integration.attention import attention_function
from hf_kvcache.integration.binding import IMPLEMENTATION
from hf_kvcache.integration.versions import with_cache
from hf_kvcache.layers.base import KVCacheLayer

#: Sequences and tokens of two passes.
Passes = tuple[tuple[int, int], tuple[int, int]]
#: Those of the two passes. Both grow, by different numbers.
_PASSES = ((2, 11), (3, 13))
#: Sequences and tokens of a third, longer one, which shows whether the two have told all.
_CHECK = (2, 301)
#: Methods of a cache's layers that models call, by the beginnings of their names.
_CALLS = ("update", "store")
#: The one among them that is left out as long as no window of tokens is full (DeepSeek V4).
_OF_FULL_WINDOWS = "update_overlap_state"
_BATCH, _TOKENS = "batch", "tokens"


@dataclass(frozen=True)
class Shape:
    """The shape of a tensor that a model gives to a cache.

    Attributes:
        dims: a number, what is added to it: ``"batch"``, ``"tokens"`` or nothing (``""``), and by what that is divided
            before.
        dtype: the dtype.
    """

    dims: tuple[tuple[int, str, int], ...]
    dtype: torch.dtype

    def sizes(self, batch: int, tokens: int) -> list[int]:
        """The sizes for so many sequences and tokens."""
        added = {"": 0, _BATCH: batch, _TOKENS: tokens}
        return [more + added[what] // rate for more, what, rate in self.dims]

    def blank(self, batch: int, tokens: int) -> torch.Tensor:
        """A tensor of this shape on the ``meta`` device."""
        return torch.empty(self.sizes(batch, tokens), dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class LayerCall:
    """A call of a method of a cache's layer in one forward pass.

    Attributes:
        method: its name.
        arguments: the positional arguments; tensors as their shapes.
        named: the other arguments, by name, in the order of their names.
    """

    method: str
    arguments: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...]

    def repeat(self, layer: Any, batch: int, tokens: int) -> None:
        """Make the call on ``layer``, with blank tensors."""

        def blank(value: Any) -> Any:
            return value.blank(batch, tokens) if isinstance(value, Shape) else value

        if self.method == _OF_FULL_WINDOWS and blank(self.arguments[1]).numel() == 0:
            return
        getattr(layer, self.method)(*map(blank, self.arguments), **{name: blank(v) for name, v in self.named})


class NotTold(ValueError):
    """A config does not tell what a plan needs."""


class ModelOnMeta:
    """The model of a config, without weights.

    Args:
        config: the config of the model's decoder.
        dtype: the dtype of its weights, and so of its keys and values.

    Attributes:
        parameters: number of weights.
        bytes: bytes of the weights.
        expert_bytes: bytes of those that belong to routed experts.
        queries: the queries ``[B, Hq, T, D]`` that read each layer of a cache of this package, by the layer's index,
            once :meth:`calls` was asked for such a cache.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        made: Any = model_class(config)
        if made is None:
            raise NotTold(f"config of {config.model_type!r}: transformers knows no class for it; accepted: its models")
        with torch.device("meta"):
            self.model: PreTrainedModel = made._from_config(config, dtype=dtype).eval()
        self.config: PreTrainedConfig = (
            self.model.config
        )  # some models copy theirs, and caches bind what they are given
        weights = {id(p): (name, p) for name, p in self.model.named_parameters()}.values()
        self.parameters = sum(p.numel() for _, p in weights)
        self.bytes = sum(p.numel() * p.element_size() for _, p in weights)
        self.expert_bytes = sum(p.numel() * p.element_size() for name, p in weights if ".experts." in name)
        self.queries: dict[int, Shape] = {}
        self._of_kind: ModelOnMeta | None = None

    def calls(self, make_cache: Callable[[PreTrainedConfig], Cache]) -> list[tuple[LayerCall, ...]]:
        """What each layer of such a cache is given in a forward pass, in order.

        Raises:
            NotTold: if the model does not run on the ``meta`` device as far as its last layer.
        """
        if self._repeats_kinds():
            kinds = self.config.layer_types
            calls = dict(zip(dict.fromkeys(kinds), self._one_of_each().calls(make_cache), strict=True))
            return [calls[kind] for kind in kinds]
        passes = _PASSES
        if compresses(self.config):  # so many tokens that all windows are full
            period = lcm(*self.config.compress_rates.values())
            passes = (2, 2 * period), (3, 5 * period)
        (first, queries), (second, other_queries) = (self._pass(make_cache(self.config), *size) for size in passes)
        both = queries.keys() & other_queries.keys()
        self.queries |= {i: _shape(queries[i], other_queries[i], passes) for i in both}
        found = []
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            if [call[0] for call in a] != [call[0] for call in b]:
                raise self._not_told(f"calls of layer {index} depend on the number of tokens")
            found.append(tuple(_merged(x, y, passes) for x, y in zip(a, b, strict=True)))
        return found

    def _repeats_kinds(self) -> bool:
        """Whether it is enough to run one layer of each type: a pass through DeepSeek V4 takes seconds."""
        return compresses(self.config) and len(set(self.config.layer_types)) < len(self.config.layer_types)

    def _one_of_each(self) -> ModelOnMeta:
        """The model with one layer of each type, in the order in which the types come first."""
        if self._of_kind is None:
            short, count = deepcopy(self.config), self.config.num_hidden_layers
            chosen = [self.config.layer_types.index(kind) for kind in dict.fromkeys(self.config.layer_types)]
            for name, value in vars(self.config).items():
                if isinstance(value, list) and len(value) == count:
                    setattr(short, name, [value[index] for index in chosen])
            short.num_hidden_layers = len(chosen)
            self._of_kind = ModelOnMeta(short, self.model.dtype)
        return self._of_kind

    def tell_all(self, make_cache: Callable[[PreTrainedConfig], Cache], calls: list[tuple[LayerCall, ...]]) -> bool:
        """Whether repeating the calls gives what a longer pass gives to layers that are not of keys and values."""
        if self._repeats_kinds():
            first = {kind: of_layer for kind, of_layer in zip(self.config.layer_types, calls, strict=True)}
            kinds = dict.fromkeys(self.config.layer_types)
            return self._one_of_each().tell_all(make_cache, [first[kind] for kind in kinds])
        repeated, run = make_cache(self.config), self.filled(make_cache, *_CHECK)
        for layer, of_layer, other in zip(repeated.layers, calls, run.layers, strict=True):
            if isinstance(layer, KVCacheLayer):
                continue
            for call in of_layer:
                call.repeat(layer, *_CHECK)
            if layer_report(layer).total != layer_report(other).total:
                return False
        return True

    def filled(self, make_cache: Callable[[PreTrainedConfig], Cache], batch: int, tokens: int) -> Cache:
        """A cache after a pass of that size."""
        cache = make_cache(self.config)
        self._pass(cache, batch, tokens)
        return cache

    def _pass(
        self, cache: Cache, batch: int, tokens: int
    ) -> tuple[list[list[tuple[str, Any, Any]]], dict[int, torch.Tensor]]:
        """The calls to each layer (names, arguments and named arguments), and the queries that read each layer."""
        seen: list[list[tuple[str, Any, Any]]] = [[] for _ in cache.layers]
        latest: list[_Update] = []
        for index, (layer, calls) in enumerate(zip(cache.layers, seen, strict=True)):
            _record(layer, calls, index, latest)
        ids = torch.zeros(batch, tokens, dtype=torch.int64, device="meta")
        with torch.no_grad(), _on_meta() as reasons, _queries(latest) as queries:
            try:
                self.model(input_ids=ids, use_cache=True, **with_cache(self.model, cache))
            except Exception as error:
                reasons.append(f"{type(error).__name__}: {error}")
        reached = max((index for index, calls in enumerate(seen) if calls), default=-1)
        if reached < _last_storing(cache):
            raise self._not_told(f"it stops on the meta device behind layer {reached} ({reasons[0][:120]})")
        return seen, queries

    def _not_told(self, reason: str) -> NotTold:
        return NotTold(f"config of {self.config.model_type!r}: no plan for it, {reason}")


def _last_storing(cache: Cache) -> int:
    """The last layer that is given something. Layers without a cache of their own are transformers' dummies."""
    return max(i for i, layer in enumerate(cache.layers) if type(layer).__name__ != "DummyLayer")


def _record(layer: Any, calls: list[tuple[str, Any, Any]], index: int, latest: list[_Update]) -> None:
    """Note the calls to the ``layer`` from now on, and its updates at the end of ``latest``."""
    plain = isinstance(layer, KVCacheLayer) and layer.options.latents != "native"

    def watched(name: str) -> Callable[..., Any]:
        method = getattr(layer, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, args, kwargs))
            result = method(*args, **kwargs)
            if name == "update":
                # Without earlier tokens all states are the new ones, and a model that reads handles needs values.
                result = args[:2] if plain else result
                latest.append(_Update(index, result if plain else None))
            return result

        return call

    for name in dir(type(layer)):
        if name.startswith(_CALLS) and callable(getattr(layer, name)):
            setattr(layer, name, watched(name))


def _merged(first: tuple[str, Any, Any], second: tuple[str, Any, Any], passes: Passes) -> LayerCall:
    """One call from its forms in both passes."""

    def merge(a: Any, b: Any) -> Any:
        return _shape(a, b, passes) if isinstance(a, torch.Tensor) else a

    (name, args, named), (_, other_args, other_named) = first, second
    rest = tuple((key, merge(named[key], other_named[key])) for key in sorted(named))
    return LayerCall(name, tuple(map(merge, args, other_args)), rest)


def _shape(first: torch.Tensor, second: torch.Tensor, passes: Passes) -> Shape:
    """The shape of a tensor from its forms in both passes."""
    return Shape(tuple(_dim(a, b, passes) for a, b in zip(first.shape, second.shape, strict=True)), first.dtype)


def _dim(first: int, second: int, passes: Passes) -> tuple[int, str, int]:
    (batch, tokens), growth = passes[0], second - first
    more_sequences, more_tokens = (after - before for before, after in zip(*passes, strict=True))
    if growth == 0:
        return first, "", 1
    if growth == more_sequences:
        return first - batch, _BATCH, 1
    if growth < 0 or more_tokens % growth:
        raise NotTold(f"a state of the model has {first} entries for {passes[0]} and {second} for {passes[1]}")
    rate = more_tokens // growth
    return first - tokens // rate, _TOKENS, rate


@dataclass
class _Update:
    """An update of a layer.

    Attributes:
        index: the layer's index.
        states: the keys and values that the model got back; None for latents, which become keys and values before
            attention reads them.
        changed: whether the model did something with them before attention.
    """

    index: int
    states: tuple[Any, Any] | None
    changed: bool = False

    def reaches(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether attention over ``key`` and ``value`` reads what the update returned."""
        return self.states is None or (not self.changed and self.states[0] is key and self.states[1] is value)


class _Changes(TorchDispatchMode):
    """Notes which states a model works on between an update and its attention."""

    def __init__(self, latest: list[_Update]) -> None:
        super().__init__()
        self.latest = latest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.latest and (states := self.latest[-1].states) is not None:
            self.latest[-1].changed |= any(x is state for x in args for state in states)
        return func(*args, **kwargs or {})


@contextmanager
def _queries(latest: list[_Update]) -> Iterator[dict[int, torch.Tensor]]:
    """Note the first queries that read the layer that was updated last, by its index; ``latest`` are the updates."""
    found: dict[int, torch.Tensor] = {}

    def attention(module: torch.nn.Module, query: torch.Tensor, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if latest and latest[-1].reaches(key, value):
            found.setdefault(latest[-1].index, query)
        return attention_function(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(IMPLEMENTATION, attention)
    try:
        with _Changes(latest):
            yield found
    finally:
        AttentionInterface.register(IMPLEMENTATION, attention_function)


@contextmanager
def _on_meta() -> Iterator[list[str]]:
    """Let models run on the ``meta`` device, where there are no values to decide by; yields what went wrong.

    Numbers read from tensors are 1. A module that needs values (the routing of experts, say) gives back its input:
    what comes behind it has the right shapes, and only shapes are looked at.
    """
    import torch.fx.experimental._config as fx

    reasons: list[str] = []
    original, nonzero = torch.nn.Module.__call__, fx.meta_nonzero_assume_all_nonzero

    def call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = next((x for x in (*args, kwargs.get("hidden_states")) if isinstance(x, torch.Tensor)), None)
        if given is not None and type(self).__name__.endswith("Experts"):
            return given  # many operators, and no cache
        try:
            return original(self, *args, **kwargs)
        except Exception as error:
            if given is None:
                raise
            reasons.append(f"{type(self).__name__}: {error}")
            return given

    with ExitStack() as stack:
        stack.enter_context(_Ones())
        stack.callback(setattr, torch.nn.Module, "__call__", original)
        stack.callback(setattr, fx, "meta_nonzero_assume_all_nonzero", nonzero)
        torch.nn.Module.__call__ = call  # type: ignore[method-assign]
        fx.meta_nonzero_assume_all_nonzero = True
        yield reasons


class _Ones(TorchDispatchMode):
    """Reads ones from tensors on the ``meta`` device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype, device="cpu").item()
        to = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and to is not None and to.type != "meta":
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=to)
        return func(*args, **kwargs)
