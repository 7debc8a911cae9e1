"""The attention function registered with transformers under ``hf_kvcache``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.integration.binding import IMPLEMENTATION, previous_implementation
from hf_kvcache.integration.compiling import TracedStates
from hf_kvcache.integration.handle import CachedStates, KVHandle
from hf_kvcache.integration.masks import mask_function
from hf_kvcache.integration.picks import Picked, PickMask
from hf_kvcache.integration.versions import COLLECTOR, RELEASE, collects_attentions
from hf_kvcache.kernels.attention import refuse_gradient
from hf_kvcache.kernels.inputs import Scoring

logger = logging.get_logger(__name__)

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def register() -> None:
    """Register the attention function and the mask function of this package with transformers."""
    AttentionInterface.register(IMPLEMENTATION, attention_function)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_function)


@cache
def check_registration(file: str) -> None:
    """Raise RuntimeError if the models of a module do not find the registered attention and mask functions.

    This is checked once for each modeling file, when a cache is bound. A release of transformers that looks for these
    functions elsewhere would use another attention function, or ignore the padding of batches.

    Args:
        file: name of the Python module that defines the model.
    """
    names = vars(sys.modules.get(file, object))
    attention = names.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    masks = names.get("ALL_MASK_ATTENTION_FUNCTIONS", ALL_MASK_ATTENTION_FUNCTIONS)
    for what, found, ours in (
        (
            "attention",
            attention.get_interface(IMPLEMENTATION, None) if IMPLEMENTATION in attention else None,
            attention_function,
        ),
        ("mask", masks.get(IMPLEMENTATION), mask_function),
    ):
        if found is not ours:
            raise RuntimeError(
                f"models of {file} of transformers {RELEASE} do not find the {what} function of this package under "
                f"{IMPLEMENTATION!r} (they find {found!r}); accepted: bind=False, where the cache is read through "
                "dense tensors, or another release of transformers"
            )


def attention_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over handles of a KVCache; dense keys and values go to the implementation set before the binding.

    Args:
        module: the attention module of the model.
        query: ``[B, Hq, T, Dk]``.
        key: a handle from a KVCache, or dense keys ``[B, Hkv, tokens, Dk]``.
        value: a handle from a KVCache, or dense values ``[B, Hkv, tokens, Dv]``.
        attention_mask: the mask that the mask function made, or None.
        scaling: factor of the scores; ``Dk ** -0.5`` if None.
        dropout: probability of dropout; a KVCache accepts 0 only.
        **kwargs: the other arguments that the model passes (``softcap``, ``s_aux``, ``is_causal``, ...).

    Returns:
        The output ``[B, T, Hq, Dv]``, and attention weights ``[B, Hq, T, tokens]`` if the model asks for them and the
        previous implementation gives them, else None. For weights the cache is read as dense tensors.
    """
    if is_dynamo_compiling():
        if isinstance(key, TracedStates):
            return _attend_in_graph(module, query, key, attention_mask, scaling, dropout, kwargs)
        return _attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    if not (isinstance(key, KVHandle) and isinstance(value, KVHandle)):
        return _attend_by_previous(module, query, (key, value), _computed(attention_mask), scaling, dropout, kwargs)
    # Decode steps come through here: what follows calls no function of ours that it need not.
    layer = key._layer if key._at_version == key._layer.version else key.layer()
    scaling_ = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    # getattr is slow for attributes that a module does not have: slower than all else in this function.
    sinks = module._parameters.get("sinks") if sinks is None else sinks
    scoring = _plain_scoring(scaling_, softcap) if sinks is None else Scoring(scaling_, softcap, sinks)
    collected = COLLECTOR.get()
    asked = kwargs.get("output_attentions") or (collected and collects_attentions(collected))
    with_weights = bool(asked) and _gives_weights(module, layer)
    if not layer.has_history():
        return _attend_first(module, query, layer, scoring, attention_mask, scaling, dropout, kwargs)
    if dropout or not _REFUSED.isdisjoint(kwargs):
        _check_supported(module, dropout, kwargs)
    plain = attention_mask is None or type(attention_mask) is torch.Tensor
    mask, picked = (attention_mask, None) if plain else _apart(attention_mask)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    call = AttentionCall(query, mask, scoring, causal, module, picked=picked)
    if not torch.is_grad_enabled() and not with_weights:
        return layer.attend(call), None
    return _attend_watched(module, query, layer, (key, value), call, with_weights, attention_mask, dropout, kwargs)


_attention = torch.compiler.disable(attention_function)


def _attend_watched(
    module: torch.nn.Module,
    query: torch.Tensor,
    layer: CachedStates,
    handles: tuple[KVHandle, KVHandle],
    call: AttentionCall,
    with_weights: bool,
    attention_mask: torch.Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over the cache where weights are asked for or gradients are recorded, which the output refuses."""
    sources = [x for x in (query, *layer.differentiable()) if x.requires_grad]
    with torch.no_grad():
        if with_weights:
            call = replace(call, mask=_computed(attention_mask), picked=None)
            dense = handles[0].dense(), handles[1].dense()
            scaling = call.scoring.scaling
            output, weights = _attend_by_previous(module, query, dense, call.mask, scaling, dropout, kwargs)
            layer.note_attended(call)
        else:
            output, weights = layer.attend(call), None
    return (refuse_gradient(output, *sources) if torch.is_grad_enabled() else output), weights


def _attend_first(
    module: torch.nn.Module,
    query: torch.Tensor,
    layer: CachedStates,
    scoring: Scoring,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention where there are no earlier tokens: the new ones attend to each other as without this package."""
    mask = _computed(attention_mask)
    result = _attend_by_previous(module, query, layer.new_tokens(), mask, scaling, dropout, kwargs)
    with torch.no_grad():
        layer.note_attended(AttentionCall(query, mask, scoring, module=module))
    return result


def _attend_in_graph(
    module: torch.nn.Module,
    query: torch.Tensor,
    states: TracedStates,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """The attention function of a layer whose attention is part of the graph that is being compiled."""
    _check_supported(module, dropout, kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = Scoring(scaling, kwargs.get("softcap"), _sink_logits(module, kwargs))
    causal = bool(_is_causal(module, kwargs))
    return states.layer.trace_attend(states, query, attention_mask, causal, scoring), None


def _computed(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask as a plain tensor."""
    return mask.dense() if isinstance(mask, PickMask) else mask


def _apart(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, Picked | None]:
    """A mask without the tokens that an indexer picked, and these; None for the latter if the mask says it all."""
    return mask.picked() if type(mask) is PickMask and mask.role == "mask" else (_computed(mask), None)


def _is_causal(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    causal = kwargs.get("is_causal")
    return getattr(module, "is_causal", True) if causal is None else causal


def _gives_weights(module: torch.nn.Module, layer: CachedStates) -> bool:
    """Whether the previous implementation gives attention weights; raises ValueError for a cache that evicts."""
    config: Any = getattr(module, "config", None)
    if config is None or previous_implementation(config) != "eager":
        return False  # only eager attention gives weights
    if layer.evicts:
        raise ValueError(
            "output_attentions=True with a cache that evicts: evicted tokens have no weight; accepted: caches that "
            "keep every token, such as KVCache(config)"
        )
    return True


def _attend_by_previous(
    module: torch.nn.Module,
    query: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over dense keys and values by the implementation that was set before the binding."""
    keys, values = states
    if "write_index" in kwargs:  # an argument of transformers' continuous batching
        logger.warning_once(
            "continuous batching (generate_batch) keeps keys and values in a cache of its own, in full precision; a "
            "KVCache that is given to it is not used. model.generate takes one"
        )
    attend = _previous_function(module)
    return attend(module, query, keys, values, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


def _previous_function(module: torch.nn.Module) -> AttentionFunction:
    """The attention function that ``module`` would call if its config were not bound."""
    config: Any = getattr(module, "config", None)
    name = "sdpa" if config is None else previous_implementation(config)
    names = _module_globals(module)
    eager = names.get("eager_attention_forward")
    if name == "eager":
        if eager is None:
            raise ValueError(
                f"attn_implementation='eager': the file of {type(module).__name__} has no eager_attention_forward; "
                "call model.set_attn_implementation('sdpa') before the cache is built"
            )
        return eager
    # A model may have replaced functions in an interface of its own.
    return names.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS).get_interface(name, eager)


def _module_globals(module: torch.nn.Module) -> dict[str, Any]:
    """The global names of the file of a module's class, or of a base class, that defines attention functions."""
    for cls in type(module).__mro__:
        names = vars(sys.modules[cls.__module__])
        if "eager_attention_forward" in names or "ALL_ATTENTION_FUNCTIONS" in names:
            return names
    return {}


def _sink_logits(module: torch.nn.Module, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Learned sink logits: an argument of attention, or a parameter that only the model's eager function reads."""
    logits = kwargs.get("s_aux")
    # getattr is slow for attributes that a module does not have: slower than all else in this function.
    return module._parameters.get("sinks") if logits is None else logits


def _reads_masks(module: torch.nn.Module) -> bool:
    """Whether a model that chooses blocks gives attention a mask of them, as it does for eager attention and sdpa."""
    config: Any = getattr(module, "config", None)
    return config is not None and previous_implementation(config) in ("eager", "sdpa")


@lru_cache(maxsize=64)
def _plain_scoring(scaling: float, softcap: float | None) -> Scoring:
    """Scoring without sink logits, which nobody changes: one object for all layers and steps."""
    return Scoring(scaling, softcap)


#: Arguments of attention functions that attention over a cache does not take.
_REFUSED = frozenset(("position_bias", "block_indices", "indices"))


def _check_supported(module: torch.nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(f"dropout={dropout!r} with a KVCache; accepted: 0.0. Call model.eval().")
    for name in sorted(_REFUSED):
        if name == "block_indices" and _reads_masks(module):
            continue  # the model has made a mask of them
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes {name!r} to attention, which a KVCache does not support; accepted: "
                "None. Call hf_kvcache.unbind(model.config) after building the cache; it is then read as dense tensors"
            )
