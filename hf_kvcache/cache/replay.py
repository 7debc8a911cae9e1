"""A second reading of the context, to see which tokens the model needs to repeat it (KVzip, arXiv:2505.23416)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hf_kvcache.eviction import Context, Policy
from hf_kvcache.eviction.selection import choose
from hf_kvcache.integration.versions import with_cache
from hf_kvcache.layers.drafts import Draft
from hf_kvcache.layers.evicting import EvictingLayer
from hf_kvcache.storage.token_view import TokenView

#: A copy of the cache whose layers are being evicted: a ``KVCache``.
Fork = Callable[[], Any]

#: Tokens that are read again at a time, as in the paper.
_CHUNK = 2048
#: Scores computed at a time.
_STRIP_ELEMENTS = 1 << 22


def compress(
    layers: Sequence[Any],
    fork: Fork,
    model: Any,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    prompt_ids: torch.Tensor | None,
    replayed: list[torch.Tensor] | None,
) -> None:
    """Evict every layer down to its budget; :meth:`hf_kvcache.KVCache.compress` says what it takes."""
    evicting = _evicting(layers)
    policy = evicting[0].eviction.policy
    if not policy.needs_replay:
        for layer in evicting:
            layer.compress()
        return
    if replayed is None:
        if model is None or input_ids is None:
            raise ValueError(f"compress(): policy {policy.name!r} reads the context again; give model and input_ids")
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
    """Read the context again on a copy of the cache, and see what attention its tokens get.

    Args:
        layers: of the cache, which holds the context and nothing else.
        fork: makes a copy of the cache.
        model: the model that filled it.
        input_ids: the context, ``[B, T]``.
        attention_mask: ``[B, T]``, 0 for padding; None if there is none.
        prompt_ids: what asks the model to repeat, ``[n]``, put before the context; None for nothing.

    Returns:
        For each layer that evicts float32 ``[B, Hkv, T]``: the largest probability that any query of the group gave
        each token, of those that the layer holds, in their order.

    Raises:
        ValueError: if the context is not what the cache holds.
    """
    evicting = _evicting(layers)
    _check(evicting, input_ids, attention_mask)
    watches = _watch(evicting, fork, model, input_ids, attention_mask, prompt_ids)
    return [watch.largest for watch in watches]


def evict_by_replay(layers: Sequence[EvictingLayer], replayed: list[torch.Tensor]) -> None:
    """Keep what the layers' policy makes of what :func:`replay` returned.

    Raises:
        ValueError: if it is not of this cache.
    """
    batch = layers[0].batch_size
    if len(replayed) != len(layers) or any(x.shape[0] != batch for x in replayed):
        raise ValueError(f"replayed has {len(replayed)} layers; accepted: what replay() returned for this cache")
    kept: list[list[torch.Tensor]] = [[] for _ in layers]
    for row in range(batch):
        found = [_scored(layer, largest, row) for layer, largest in zip(layers, replayed, strict=True)]
        for of_layer, keep in zip(kept, _chosen(layers[0].eviction.policy, found), strict=True):
            of_layer.append(keep)
    for layer, rows in zip(layers, kept, strict=True):
        layer.keep_only(rows)


class Watch:
    """The largest probability that each key of a layer got from any replayed query of its group.

    Args:
        layer: whose keys; it holds the context.
    """

    def __init__(self, layer: EvictingLayer) -> None:
        assert layer.storage is not None
        self.storage = layer.storage
        self.held = [TokenView.of(self.storage, np.array([row])) for row in range(self.storage.batch)]
        shape = (self.storage.batch, self.storage.heads, max(held.tokens for held in self.held))
        self.largest = torch.zeros(shape, device=self.storage.device)

    def __call__(self, draft: Draft, log_sum_exp: torch.Tensor) -> None:
        """Take in the queries of one call of attention and their log-sum-exp ``[B, Hq, q]``."""
        for row, held in enumerate(self.held):
            valid = None if draft.new.valid is None else torch.from_numpy(draft.new.valid[row])
            query, total = draft.call.queries[row].float(), log_sum_exp[row]
            if valid is not None:
                query, total = query[:, valid.to(query.device)], total[:, valid.to(query.device)]
            keys = held.states("keys")[0]
            largest = self.largest[row, :, : held.tokens]
            query = (query * draft.call.scoring.inner).unflatten(0, (keys.shape[0], -1)).flatten(1, 2)
            total = total.unflatten(0, (keys.shape[0], -1)).flatten(1, 2)
            step = max(1, _STRIP_ELEMENTS // (keys.shape[0] * held.tokens))
            for start in range(0, query.shape[1], step):
                scores = query[:, start : start + step] @ keys.transpose(-1, -2)
                if draft.call.scoring.softcap is not None:
                    scores = scores.tanh_().mul_(draft.call.scoring.softcap)
                found = scores.sub_(total[:, start : start + step, None]).amax(1).exp_()
                torch.maximum(largest, found, out=largest)


def _evicting(layers: Sequence[Any]) -> list[EvictingLayer]:
    """Those of the layers that evict; raises ValueError if none does."""
    evicting = [layer for layer in layers if isinstance(layer, EvictingLayer)]
    if not evicting:
        raise ValueError("compress(): this cache keeps every token; accepted: caches with a budget")
    return evicting


def _watch(
    layers: list[EvictingLayer],
    fork: Fork,
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    prompt_ids: torch.Tensor | None,
) -> list[Watch]:
    """Run the model over the context again, chunk by chunk, each on a copy of the cache."""
    watches = [Watch(layer) for layer in layers]
    batch, length = input_ids.shape
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
    for start in range(0, length, _CHUNK):
        ids, real = input_ids[:, start : start + _CHUNK], mask[:, start : start + _CHUNK]
        if prompt_ids is not None:
            asked = prompt_ids.to(ids).expand(batch, -1)
            ids, real = torch.cat([asked, ids], 1), torch.cat([torch.ones_like(asked), real], 1)
            # Padding first: in the middle of a sequence a mask would hide tokens, not mark padding.
            order = real.argsort(dim=1, stable=True)
            ids, real = ids.gather(1, order), real.gather(1, order)
        copy = fork()
        by_index = {layer.index: watch for layer, watch in zip(layers, watches, strict=True)}
        for layer in copy.layers:
            if isinstance(layer, EvictingLayer):
                layer.watcher = by_index[layer.index]
        whole = torch.cat([mask, real], 1)
        inputs: dict[str, Any] = {}
        if not bool(whole.all()):
            positions = (whole.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            inputs = {"attention_mask": whole, "position_ids": positions}
        model(input_ids=ids, **with_cache(model, copy), use_cache=True, logits_to_keep=1, **inputs)
    return watches


def _scored(layer: EvictingLayer, largest: torch.Tensor, row: int) -> tuple[Context, torch.Tensor]:
    """What the policy sees of one sequence of a layer, and its scores ``[1, Hkv, T]``."""
    assert layer.storage is not None and layer.evictor is not None
    held, selection = TokenView.of(layer.storage, np.array([row])), layer.evictor.selection()
    protected = selection.protected(held, 0)
    quota = max(selection.quota(row), int(protected.sum(-1).max(initial=0)))
    context = selection.context(held, quota, protected)
    context.replayed = largest[row : row + 1, :, : held.tokens]
    return context, selection.scores(context)


def _chosen(policy: Policy, found: list[tuple[Context, torch.Tensor]]) -> list[torch.Tensor]:
    """The tokens of each layer that stay, bool ``[1, Hkv, T]``."""
    if not policy.across_layers:
        return [
            choose(score, context.protected, context.held, context.quota, policy.head_floor) for context, score in found
        ]
    contexts, scores = [context for context, _ in found], [score for _, score in found]
    # All heads of all layers as if they were the heads of one.
    longest, heads = max(score.shape[2] for score in scores), [score.shape[1] for score in scores]

    def joined(parts: list[torch.Tensor], fill: float) -> torch.Tensor:
        return torch.cat([torch.nn.functional.pad(x, (0, longest - x.shape[2]), value=fill) for x in parts], 1)

    held = joined([torch.ones_like(c.protected) if c.held is None else c.held for c in contexts], False)
    protected = joined([c.protected for c in contexts], False)
    quota = max(context.quota for context in contexts)
    keep = choose(joined(scores, 0.0), protected, held, quota, policy.head_floor or 0.0)
    parts = keep.split(heads, 1)
    return [part[:, :, : score.shape[2]] for part, score in zip(parts, scores, strict=True)]


def _check(layers: list[EvictingLayer], input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    seen, held = layers[0].get_seq_length(), layers[0].batch_size
    if input_ids.dim() != 2 or tuple(input_ids.shape) != (held, seen):
        raise ValueError(
            f"input_ids of shape {tuple(input_ids.shape)}; accepted: [{held}, {seen}], the tokens that the cache holds"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask of shape {tuple(attention_mask.shape)}; accepted: {tuple(input_ids.shape)}")
    if any(layer.evictor is not None and layer.evictor.evictions for layer in layers):
        raise ValueError("compress(): the cache has evicted already; accepted: one that still holds the whole context")
