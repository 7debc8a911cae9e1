"""Reading the context a second time, to measure which tokens the model needs to repeat it (KVzip, arXiv:2505.23416)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_kvcache.cache.watch import Watch
from hf_kvcache.eviction import Policy
from hf_kvcache.eviction.selection import choose
from hf_kvcache.integration.versions import with_cache
from hf_kvcache.layers.evicting import EvictingLayer
from hf_kvcache.storage.token_view import TokenView
from hf_kvcache.utils.autocast import without_autocast

#: A function that copies the cache: the method ``fork`` of a ``KVCache``.
Fork = Callable[[], Any]

#: Number of tokens in a forward pass of the second reading, as in the paper.
_CHUNK = 2048
#: Queries of each head to which kept tokens are fitted, at most about so many.
_REFERENCE_QUERIES = 512


class Replayed(list[torch.Tensor]):
    """What a second reading found: for each layer a tensor, as :func:`replay` says.

    Attributes:
        queries: for each layer and sequence, queries ``[1, Hq, n, Dk]`` of the second reading; None if no kept token is
            to be fitted to them.
        squares: whether the numbers are root mean squares of probabilities; else they are the largest ones.
    """

    queries: list[list[torch.Tensor]] | None = None
    squares: bool = False

    def rows(self, rows: slice) -> Replayed:
        """The same for some of the sequences; the tensors are views."""
        other = Replayed(layer[rows] for layer in self)
        other.squares = self.squares
        other.queries = None if self.queries is None else [layer[rows] for layer in self.queries]
        return other


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
        if policy.across_layers:
            evict_together(evicting)
            return
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
) -> Replayed:
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
        ``replay_squares``, the root mean square over these queries, of the probabilities over the context alone. For
        policies with ``replay_by_head``, ``[B, Hkv, g, T]``: by query head, each probability over the length of the
        query's hidden state. Of a cache with ``compensate="match"``, queries of the second reading besides.

    Raises:
        ValueError: if no layer evicts, a layer has evicted already, the shapes do not fit the cache, or hidden states
            are needed of an attention module that is not known.
    """
    evicting = evicting_layers(layers)
    _check(evicting, input_ids, attention_mask)
    watches = _read_again(evicting, fork, model, input_ids, attention_mask, prompt_ids)
    found = Replayed(watch.result() for watch in watches)
    found.squares = evicting[0].eviction.policy.replay_squares
    if evicting[0].eviction.matches:
        found.queries = [[torch.cat(parts, 1)[None] for parts in watch.queries] for watch in watches]
    return found


def evict_by_replay(layers: Sequence[EvictingLayer], replayed: list[torch.Tensor]) -> None:
    """Evict tokens down to the budget, by the result of a second reading.

    Args:
        layers: the layers that evict.
        replayed: what :func:`replay` returned for these layers.

    Raises:
        ValueError: if the result has another number of layers or sequences, another policy's shape, or no queries
            where kept tokens are to be fitted to them.
    """
    batch, policy = layers[0].batch_size, layers[0].eviction.policy
    if len(replayed) != len(layers) or any(x.shape[0] != batch for x in replayed):
        raise ValueError(f"replayed has {len(replayed)} layers; accepted: what replay() returned for this cache")
    if any(x.dim() != 3 + policy.replay_by_head for x in replayed):
        raise ValueError(
            f"replayed[0] of shape {tuple(replayed[0].shape)}; accepted: what replay() returned for policy "
            f"{policy.name!r}, {'[B, Hkv, g, T]' if policy.replay_by_head else '[B, Hkv, T]'}"
        )
    queries = replayed.queries if isinstance(replayed, Replayed) else None
    if isinstance(replayed, Replayed) and replayed.squares != policy.replay_squares:
        raise ValueError(
            f"replayed was measured for another policy than {policy.name!r}; accepted: what replay() returned for a "
            f"cache with policy {policy.name!r}"
        )
    if layers[0].eviction.matches and queries is None:
        raise ValueError(
            "replayed has no queries, which compensate='match' fits kept tokens to; accepted: what replay() returned "
            "for a cache with compensate='match'"
        )
    _evict(layers, replayed, queries)


def evict_together(layers: Sequence[EvictingLayer]) -> None:
    """Evict tokens down to the budget, for which the heads of all layers compete; needs no second reading.

    Args:
        layers: the layers that evict.
    """
    for layer in layers:
        layer.flush()
    if all(layer.storage is not None for layer in layers):
        _evict(layers, [None] * len(layers))


def _evict(
    layers: Sequence[EvictingLayer],
    replayed: Sequence[torch.Tensor | None],
    queries: Sequence[list[torch.Tensor]] | None = None,
) -> None:
    """Choose in all layers, a sequence at a time, then drop what was not chosen."""
    policy = layers[0].eviction.policy
    kept: list[list[torch.Tensor]] = [[] for _ in layers]
    for row in range(layers[0].batch_size):
        scored = [score_sequence(layer, largest, row) for layer, largest in zip(layers, replayed, strict=True)]
        for of_layer, keep in zip(kept, _choose_tokens(policy, scored), strict=True):
            of_layer.append(keep)
    reference: Sequence[list[torch.Tensor] | None] = [None] * len(layers)
    if layers[0].eviction.matches and queries is not None:
        reference = queries
    for layer, rows, asked in zip(layers, kept, reference, strict=True):
        layer.keep_only(rows, asked)


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
    stride = -(-input_ids.shape[1] // _REFERENCE_QUERIES)
    watches = [Watch(layer, stride) for layer in layers]
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


class Scored(NamedTuple):
    """What is chosen by in one sequence of a layer, without the keys and values, which all layers together may not fit.

    Attributes:
        scores: ``[1, Hkv, T]``.
        protected: bool ``[1, Hkv, T]``, the tokens that stay whatever their score.
        held: bool ``[1, Hkv, T]``, False where there is no token; None if there is one everywhere.
        quota: tokens that a head keeps on average.
    """

    scores: torch.Tensor
    protected: torch.Tensor
    held: torch.Tensor | None
    quota: int


def score_sequence(layer: EvictingLayer, largest: torch.Tensor | None, row: int) -> Scored:
    """Let the policy score one sequence of a layer."""
    assert layer.storage is not None and layer.evictor is not None
    held, selection = TokenView.of(layer.storage, np.array([row])), layer.evictor.selection()
    quota, recent = selection.share(held)
    with without_autocast(layer.storage.device):
        context = selection.context(held, quota, selection.protected(held, recent))
        if largest is not None:
            context.replayed = largest[row : row + 1, ..., : held.tokens]
        return Scored(selection.scores(context), context.protected, context.held, quota)


def _choose_tokens(policy: Policy, scored: list[Scored]) -> list[torch.Tensor]:
    """Choose the tokens that stay, for each layer bool ``[1, Hkv, T]``."""
    if not policy.across_layers:
        return [choose(*each, policy.head_floor, policy.keeps_above) for each in scored]
    # The heads of all layers compete for the budget like the heads of one layer. Layers may be on different devices.
    heads, device = [each.scores.shape[1] for each in scored], scored[0].scores.device
    longest = max(each.scores.shape[2] for each in scored)

    def joined(parts: list[torch.Tensor], fill: float) -> torch.Tensor:
        padded = [torch.nn.functional.pad(x.to(device), (0, longest - x.shape[2]), value=fill) for x in parts]
        return torch.cat(padded, 1)

    held = joined([torch.ones_like(each.protected) if each.held is None else each.held for each in scored], False)
    protected = joined([each.protected for each in scored], False)
    scores = joined([each.scores for each in scored], 0.0)
    quota = sum(each.quota * count for each, count in zip(scored, heads, strict=True)) // sum(heads)
    keep = choose(scores, protected, held, quota, policy.head_floor or 0.0, policy.keeps_above)
    parts = keep.split(heads, 1)
    return [part[:, :, : each.scores.shape[2]] for part, each in zip(parts, scored, strict=True)]


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
