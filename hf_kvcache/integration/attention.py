"""The attention function registered with transformers under ``hf_kvcache``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.integration.binding import IMPLEMENTATION, previous_implementation
from hf_kvcache.integration.handle import CachedStates, KVHandle
from hf_kvcache.integration.masks import mask_function
from hf_kvcache.integration.versions import COLLECTOR, RELEASE, collects_attentions
from hf_kvcache.kernels.attention import refuse_gradient
from hf_kvcache.kernels.inputs import Scoring

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def register() -> None:
    """Make the attention and the mask function known to transformers."""
    AttentionInterface.register(IMPLEMENTATION, attention_function)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_function)


@cache
def check_reached(file: str) -> None:
    """Raise RuntimeError unless models written in the module ``file`` find the attention and the mask function.

    Asked once a file, when a cache is bound: a release of transformers that looks for them elsewhere would leave the
    cache without its attention, or batches without their padding.
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
    """Attention over a KVCache, or for any other keys and values what was set before the binding.

    Args:
        module: the attention module.
        query: ``[B, Hq, T, Dk]``.
        key: handle from a KVCache, or keys ``[B, Hkv, tokens, Dk]``.
        value: the same for values.
        attention_mask: as the mask function made it.
        scaling: factor of the scores; ``Dk ** -0.5`` if None.
        dropout: must be 0 for a KVCache.
        **kwargs: whatever else the model passes.

    Returns:
        Output ``[B, T, Hq, Dv]`` and, where the previous implementation gives them and the model asks for them,
        attention weights over all tokens seen: then the cache is read as dense tensors.
    """
    if is_dynamo_compiling():
        return _attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if not (isinstance(key, KVHandle) and isinstance(value, KVHandle)):
        return _by_previous(module, query, (key, value), attention_mask, scaling, dropout, kwargs)
    layer = key.layer()
    scaling_ = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = Scoring(scaling_, kwargs.get("softcap"), _sink_logits(module, kwargs))
    collected = COLLECTOR.get()
    asked = kwargs.get("output_attentions") or (collected and collects_attentions(collected))
    weights = bool(asked) and _gives_weights(module, layer)
    if not layer.has_history():
        # Nothing is compressed yet: the first tokens attend to each other exactly as without this package.
        result = _by_previous(module, query, layer.new_tokens(), attention_mask, scaling, dropout, kwargs)
        with torch.no_grad():
            layer.note_attended(AttentionCall(query, attention_mask, scoring, module=module))
        return result
    _check_supported(module, dropout, kwargs)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    call = AttentionCall(query, attention_mask, scoring, causal, module)
    if not torch.is_grad_enabled() and not weights:
        return layer.attend(call), None
    sources = [x for x in (query, *layer.differentiable()) if x.requires_grad]
    with torch.no_grad():
        if weights:
            # By the function that gives them without a cache of this package, over dense tensors.
            dense = key.dense(), value.dense()
            output, given = _by_previous(module, query, dense, attention_mask, scaling, dropout, kwargs)
            layer.note_attended(call)
        else:
            output, given = layer.attend(call), None
    if not torch.is_grad_enabled():
        return output, given
    return refuse_gradient(output, *sources), given


_attention = torch.compiler.disable(attention_function)


def _gives_weights(module: torch.nn.Module, layer: CachedStates) -> bool:
    """Whether the implementation that was set before gives attention weights; raises if the cache cannot give them."""
    config: Any = getattr(module, "config", None)
    if config is None or previous_implementation(config) != "eager":
        return False  # no other one does, whatever the cache
    if layer.evicts:
        raise ValueError(
            "output_attentions=True with a cache that evicts: tokens that are gone have no weight; accepted: caches "
            "that keep every token, such as KVCache(config)"
        )
    return True


def _by_previous(
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
    attend = _previous(module)
    return attend(module, query, keys, values, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


def _previous(module: torch.nn.Module) -> AttentionFunction:
    """The attention function that ``module`` would call, were its config not bound."""
    config: Any = getattr(module, "config", None)
    name = "sdpa" if config is None else previous_implementation(config)
    names = _names_of(module)
    eager = names.get("eager_attention_forward")
    if name == "eager":
        if eager is None:
            raise ValueError(
                f"{type(module).__name__} has no eager attention function beside it; call "
                "model.set_attn_implementation('sdpa') before the cache is built"
            )
        return eager
    # A model may have replaced functions in an interface of its own.
    return names.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS).get_interface(name, eager)


def _names_of(module: torch.nn.Module) -> dict[str, Any]:
    """The global names of the file that defines the attention module, or of a base class of it that has attention."""
    for cls in type(module).__mro__:
        names = vars(sys.modules[cls.__module__])
        if "eager_attention_forward" in names or "ALL_ATTENTION_FUNCTIONS" in names:
            return names
    return {}


def _sink_logits(module: torch.nn.Module, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Learned sink logits: passed along, or where only the module's own eager function would look for them."""
    logits = kwargs.get("s_aux")
    # Not by getattr: for what a module does not have, that takes longer than the rest of this function's work.
    return module._parameters.get("sinks") if logits is None else logits


def _check_supported(module: torch.nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(f"dropout={dropout!r} with a KVCache; accepted: 0.0. Call model.eval().")
    for name in ("position_bias", "block_indices", "indices"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes {name!r} to attention, which a KVCache does not support; call "
                "hf_kvcache.unbind(model.config) after building the cache: it is then read through dense tensors"
            )
