"""Reading the context a second time, to measure which tokens the model needs to repeat it (KVzip, arXiv:2505.23416)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from hf_kvcache.cache.watch import Watch
from hf_kvcache.eviction import Context, Policy
from hf_kvcache.eviction.selection import choose
from hf_kvcache.integration.versions import with_cache
from hf_kvcache.layers.evicting import EvictingLayer
from hf_kvcache.storage.token_view import TokenView

#: A function that copies the cache: the method ``fork`` of a ``KVCache``.
Fork = Callable[[], Any]

#: Number of tokens in a forward pass of the second reading, as in the paper.
_CHUNK = 2048


def compress(
    layers: Sequence[Any],
    fork: Fork,
    model: Any,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    prompt_ids: torch.Tensor | None,
    replayed: list[torch.Tensor] | None,
) -> None:
    """Evict tokens of every layer down to its budget, for :meth:`hf_kvcache.KVCache.compress`."""
    evicting = evicting_layers(layers)
    policy = evicting[0].eviction.policy
    if not policy.needs_replay:
        for layer in evicting:
            layer.compress()
        return
    if replayed is None:
        if model is None or input_ids is None:
            raise ValueError(
                f"compress(): policy {policy.name!r} reads the context again; give model and input_ids, or replayed"
            )
        replayed = replay(evicting, fork, model, input_ids, attention_mask, prompt_ids)
    evict_by_replay(evicting, replayed)


@torch.no_grad()
def replay(
    layers: Sequence[Any],
    fork: Fork,
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    prompt_ids: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Read the context again on copies of the cache, and measure the attention to its tokens.

    Args:
        layers: the layers of the cache, which holds the context and nothing else.
        fork: a function that copies the cache.
        model: the model that filled the cache.
        input_ids: the tokens of the context, ``[B, T]``.
        attention_mask: ``[B, T]``, 0 for padding; None if there is no padding.
        prompt_ids: tokens ``[n]`` that are put before the context and ask the model to repeat it; None for none.

    Returns:
        For each layer that evicts, float32 ``[B, Hkv, T]`` for its T stored tokens in their order: the largest
        attention probability that a token got from any query of the head's group. For policies with
        ``replay_by_head``, ``[B, Hkv, g, T]``: by query head, each probability over the length of the query's hidden
        state.

    Raises:
        ValueError: if no layer evicts, a layer has evicted already, the shapes do not fit the cache, or hidden states
            are needed of an attention module that is not known.
    """
    evicting = evicting_layers(layers)
    _check(evicting, input_ids, attention_mask)
    watches = _read_again(evicting, fork, model, input_ids, attention_mask, prompt_ids)
    return [watch.largest for watch in watches]


def evict_by_replay(layers: Sequence[EvictingLayer], replayed: list[torch.Tensor]) -> None:
    """Evict tokens down to the budget, by the result of a second reading.

    Args:
        layers: the layers that evict.
        replayed: what :func:`replay` returned for these layers.

    Raises:
        ValueError: if the result has another number of layers or sequences, or another policy's shape.
    """
    batch, policy = layers[0].batch_size, layers[0].eviction.policy
    if len(replayed) != len(layers) or any(x.shape[0] != batch for x in replayed):
        raise ValueError(f"replayed has {len(replayed)} layers; accepted: what replay() returned for this cache")
    if any(x.dim() != 3 + policy.replay_by_head for x in replayed):
        raise ValueError(
            f"replayed[0] of shape {tuple(replayed[0].shape)}; accepted: what replay() returned for policy "
            f"{policy.name!r}, {'[B, Hkv, g, T]' if policy.replay_by_head else '[B, Hkv, T]'}"
        )
    kept: list[list[torch.Tensor]] = [[] for _ in layers]
    for row in range(batch):
        scored = [score_sequence(layer, largest, row) for layer, largest in zip(layers, replayed, strict=True)]
        for of_layer, keep in zip(kept, _choose_tokens(policy, scored), strict=True):
            of_layer.append(keep)
    for layer, rows in zip(layers, kept, strict=True):
        layer.keep_only(rows)


def evicting_layers(layers: Sequence[Any]) -> list[EvictingLayer]:
    """The layers that evict; raises ValueError if there are none."""
    evicting = [layer for layer in layers if isinstance(layer, EvictingLayer)]
    if not evicting:
        raise ValueError("compress(): this cache keeps every token; accepted: caches with a budget")
    return evicting


def _read_again(
    layers: list[EvictingLayer],
    fork: Fork,
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    prompt_ids: torch.Tensor | None,
) -> list[Watch]:
    """Run the model over the context again, in chunks. Each chunk is read on a copy of the cache."""
    watches = [Watch(layer) for layer in layers]
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
    with ExitStack() as hooks:
        for layer, watch in zip(layers, watches, strict=True):
            handle = watch.attach(layer)
            if handle is not None:
                hooks.callback(handle.remove)
        by_index = {layer.index: watch for layer, watch in zip(layers, watches, strict=True)}
        _read_chunks(by_index, fork, model, input_ids, mask, prompt_ids)
    return watches


def _read_chunks(
    watches: dict[int, Watch],
    fork: Fork,
    model: Any,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    prompt_ids: torch.Tensor | None,
) -> None:
    """Read the context in chunks, each on a copy of the cache whose layers are watched, by their index in the model."""
    batch, length = input_ids.shape
    for start in range(0, length, _CHUNK):
        ids, valid = input_ids[:, start : start + _CHUNK], mask[:, start : start + _CHUNK]
        if prompt_ids is not None:
            asked = prompt_ids.to(ids).expand(batch, -1)
            ids, valid = torch.cat([asked, ids], 1), torch.cat([torch.ones_like(asked), valid], 1)
            # Padding is moved to the front. Hidden tokens between others do not count as padding.
            order = valid.argsort(dim=1, stable=True)
            ids, valid = ids.gather(1, order), valid.gather(1, order)
        copy = fork()
        for layer in copy.layers:
            if isinstance(layer, EvictingLayer):
                layer.watcher = watches[layer.index]
        whole = torch.cat([mask, valid], 1)
        inputs: dict[str, Any] = {}
        if not bool(whole.all()):
            positions = (whole.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            inputs = {"attention_mask": whole, "position_ids": positions}
        model(input_ids=ids, **with_cache(model, copy), use_cache=True, logits_to_keep=1, **inputs)


def score_sequence(layer: EvictingLayer, largest: torch.Tensor, row: int) -> tuple[Context, torch.Tensor]:
    """The context that the policy sees of one sequence of a layer, and the scores ``[1, Hkv, T]`` of its tokens."""
    assert layer.storage is not None and layer.evictor is not None
    held, selection = TokenView.of(layer.storage, np.array([row])), layer.evictor.selection()
    protected = selection.protected(held, 0)
    quota = max(selection.quota(row), selection.most_protected(held))
    context = selection.context(held, quota, protected)
    context.replayed = largest[row : row + 1, ..., : held.tokens]
    return context, selection.scores(context)


def _choose_tokens(policy: Policy, scored: list[tuple[Context, torch.Tensor]]) -> list[torch.Tensor]:
    """Choose the tokens that stay, for each layer bool ``[1, Hkv, T]``."""
    if not policy.across_layers:
        return [
            choose(score, context.protected, context.held, context.quota, policy.head_floor, policy.keeps_above)
            for context, score in scored
        ]
    contexts, scores = [context for context, _ in scored], [score for _, score in scored]
    # The heads of all layers compete for the budget like the heads of one layer.
    longest, heads = max(score.shape[2] for score in scores), [score.shape[1] for score in scores]

    def joined(parts: list[torch.Tensor], fill: float) -> torch.Tensor:
        return torch.cat([torch.nn.functional.pad(x, (0, longest - x.shape[2]), value=fill) for x in parts], 1)

    held = joined([torch.ones_like(c.protected) if c.held is None else c.held for c in contexts], False)
    protected = joined([c.protected for c in contexts], False)
    quota = max(context.quota for context in contexts)
    keep = choose(joined(scores, 0.0), protected, held, quota, policy.head_floor or 0.0, policy.keeps_above)
    parts = keep.split(heads, 1)
    return [part[:, :, : score.shape[2]] for part, score in zip(parts, scores, strict=True)]


def _check(layers: list[EvictingLayer], input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    seen, held = layers[0].get_seq_length(), layers[0].batch_size
    if input_ids.dim() != 2 or tuple(input_ids.shape) != (held, seen):
        raise ValueError(
            f"input_ids of shape {tuple(input_ids.shape)}; accepted: [{held}, {seen}], the tokens that the cache "
            "has seen"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask of shape {tuple(attention_mask.shape)}; accepted: {tuple(input_ids.shape)}")
    if any(layer.evictor is not None and layer.evictor.evictions for layer in layers):
        raise ValueError("compress(): the cache has evicted already; accepted: a cache that holds the whole context")
