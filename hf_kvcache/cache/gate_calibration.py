"""From a model and texts to a learned gate, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from hf_kvcache.cache.evicting import HeavyHitterCache
from hf_kvcache.cache.replay import evicting_layers, replay, score_sequence
from hf_kvcache.eviction.gate_fitting import SMALLEST_SCORE, LayerData, fit_linear, fit_mlp, fit_of
from hf_kvcache.eviction.gates import Gate
from hf_kvcache.integration.hidden_states import recorded
from hf_kvcache.integration.model_identity import model_identity, sample_weights
from hf_kvcache.integration.placement import reads_on, refuse_tensor_parallel
from hf_kvcache.integration.versions import with_cache
from hf_kvcache.utils.validation import whole

_REPEAT = "\n\nRepeat the previous context exactly.\n"
#: One chunk in so many is not fitted to, and tells how good the fit is.
_HELD_OUT = 5


def calibrate_gate(
    model: Any,
    texts: Iterable[str],
    tokenizer: Any,
    tokens: int = 32_768,
    length: int = 1024,
    inner: int = 0,
    sinks: int = 4,
    advance: Callable[[int], None] | None = None,
) -> Gate:
    """Fit a gate for the policy ``"gate"``: a map from hidden states to the logarithm of KVzip+'s scores.

    The model reads each chunk of the texts twice, as the policy ``"kvzipplus"`` does. One chunk of five is held out:
    the strength of the ridge is chosen, and the fit (``gate.fit``) measured, by these.

    In memory are one chunk's activations and, per layer, two matrices ``[hidden + Hkv, hidden + Hkv]`` in float64; for
    an MLP also the hidden states of all tokens, in bfloat16.

    Args:
        model: a causal language model that caches keys and values.
        texts: of the kind that the model will read, from the first one on until there are enough tokens.
        tokenizer: the model's.
        tokens: number of tokens that are read.
        length: number of tokens that are read at a time; what is shorter is left out.
        inner: channels of an MLP with one hidden layer; 0 for a linear map.
        sinks: first tokens of each chunk that do not count, since caches keep them.
        advance: called with the number of tokens of each chunk that has been read.

    Raises:
        ValueError: for a number out of range, texts of less than two chunks, or a model in which no layer evicts, or
            which several processes share by tensor parallelism.
    """
    whole("tokens", tokens), whole("inner", inner, 0), whole("sinks", sinks, 0)
    if whole("length", length) <= sinks:
        raise ValueError(f"length={length!r}; accepted: more than sinks={sinks!r}")
    refuse_tensor_parallel(model, "calibrating a gate")
    data: dict[int, LayerData] = {}
    number = 0
    for number, chunk in enumerate(_chunks(texts, tokenizer, tokens, length), 1):
        # The second is held out, and so is one of two.
        held_out = number % _HELD_OUT == 2
        for index, (hidden, scores) in _scored(model, tokenizer, chunk).items():
            of_layer = data.setdefault(index, LayerData(hidden.shape[1]))
            of_layer.add(hidden[sinks:], scores[sinks:].clamp_min(SMALLEST_SCORE).log(), held_out, keep=inner > 0)
        if advance is not None:
            advance(length)
    if number < 2:
        raise ValueError(
            f"texts of less than two chunks of length={length!r}; accepted: longer texts, or a smaller length"
        )
    layers, fit = {}, {}
    for index in sorted(data):
        layers[index], fit[index] = fit_linear(data[index])
        if inner:
            layers[index] = fit_mlp(data[index], inner)
            fit[index] = fit_of(layers[index], data[index])
    return Gate(layers, model_identity(model.config), sample_weights(model), fit, number * length)


@torch.no_grad()
def _scored(model: Any, tokenizer: Any, chunk: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """By layer, the hidden states ``[n, hidden]`` of a chunk ``[1, n]`` and KVzip+'s scores ``[n, Hkv]``."""
    ids = chunk.to(reads_on(model))
    cache = HeavyHitterCache(model.config, ids.shape[1], policy="kvzipplus", sink_length=0, tail_length=0)
    hidden: dict[int, torch.Tensor] = {}
    with recorded(model, lambda layer, states: hidden.update({layer: states.detach()})):
        model(input_ids=ids, **with_cache(model, cache), use_cache=True, logits_to_keep=1)
    asked = tokenizer(_REPEAT, add_special_tokens=False, return_tensors="pt").input_ids[0]
    found = {}
    layers = evicting_layers(cache.layers)
    for layer, largest in zip(layers, replay(layers, cache.fork, model, ids, prompt_ids=asked), strict=True):
        if layer.index not in hidden:
            raise ValueError(
                f"{type(model).__name__} gives the attention of layer {layer.index} no hidden states; accepted: models "
                "whose attention modules take hidden_states"
            )
        found[layer.index] = hidden[layer.index][0], score_sequence(layer, largest, 0).scores[0].mT
    return found


def _chunks(texts: Iterable[str], tokenizer: Any, tokens: int, length: int) -> Iterator[torch.Tensor]:
    """Token ids ``[1, length]``, ``tokens`` in all or less."""
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        for chunk in ids.split(length, dim=1):
            if chunk.shape[1] < length or tokens < length:
                break
            tokens -= length
            yield chunk
        if tokens < length:
            return
