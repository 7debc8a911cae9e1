"""What attention gives the tokens of a layer while the context is read a second time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from hf_kvcache.layers.drafts import Draft
from hf_kvcache.layers.evicting import EvictingLayer
from hf_kvcache.storage.token_view import TokenView

#: Number of scores that are computed at once, to bound the memory.
_STRIP_ELEMENTS = 1 << 22


class Watch:
    """Records the attention probability that each key of a layer gets from the queries of its group.

    That is the largest of any query. Or it is the root mean square over all of them, of the probabilities over the
    tokens of the context alone, as the policy says.

    Args:
        layer: the layer, which holds the context.
        stride: one query in so many is kept, where kept tokens are to be fitted to the queries.

    Attributes:
        storage: that of the layer.
        by_head: whether the policy asks for each query head, over the lengths of hidden states.
        held: the tokens of each sequence.
        found: float32 ``[B, Hkv, T]``, the largest probability or the sum of squares; ``[B, Hkv, g, T]`` by query head.
        counts: how many queries of each sequence were counted, those of every query head.
        queries: of each sequence, the queries ``[Hq, n, Dk]`` that were kept of each call; empty if none are wanted.
        hidden: the lengths ``[B, q]`` of the hidden states whose attention comes next; None if nobody asks for them.
    """

    def __init__(self, layer: EvictingLayer, stride: int) -> None:
        assert layer.storage is not None
        self.stride = stride if layer.eviction.matches else 0
        self.queries: list[list[torch.Tensor]] = [[] for _ in range(layer.storage.batch)]
        self.storage, self.by_head = layer.storage, layer.eviction.policy.replay_by_head
        self.held = [TokenView.of(self.storage, np.array([row])) for row in range(self.storage.batch)]
        shape = (self.storage.batch, self.storage.heads, max(held.tokens for held in self.held))
        self.found = torch.zeros(shape, dtype=torch.float32, device=self.storage.device)
        self.squares, self.counts = layer.eviction.policy.replay_squares, [0] * self.storage.batch
        self.hidden: torch.Tensor | None = None

    def attach(self, layer: EvictingLayer) -> RemovableHandle | None:
        """Have the attention module of ``layer`` tell its hidden states, if the policy asks for their lengths."""
        if not self.by_head:
            return None
        attending = None if layer.evictor is None else layer.evictor.attending
        module = None if attending is None else attending.module
        if module is None:
            raise ValueError(
                f"layer {layer.index}: policy {layer.eviction.policy.name!r} needs the hidden states of the attention "
                "module, which is not known; accepted: a cache that the model has filled in this process"
            )
        return module.register_forward_pre_hook(self._see_hidden, with_kwargs=True)

    def __call__(self, draft: Draft, log_sum_exp: torch.Tensor) -> None:
        """Record one attention call.

        Args:
            draft: the update, with its queries ``[B, Hq, q, Dk]``.
            log_sum_exp: of the scores of each query, ``[B, Hq, q]``.
        """
        if self.by_head:
            log_sum_exp = log_sum_exp + self._taken_logarithms(draft).to(log_sum_exp.device)
            if self.found.dim() == 3:
                groups = draft.call.queries.shape[1] // self.storage.heads
                self.found = self.found[:, :, None].repeat(1, 1, groups, 1)
        for row, held in enumerate(self.held):
            valid = None if draft.new.valid is None else torch.from_numpy(draft.new.valid[row])
            query, total = draft.call.queries[row].float(), log_sum_exp[row]
            if valid is not None:
                query, total = query[:, valid.to(query.device)], total[:, valid.to(query.device)]
            if self.stride:
                # The last query is kept in any case, so that there is one.
                kept = query.flip(1)[:, :: self.stride].flip(1)
                self.queries[row].append(kept.to(draft.call.queries.dtype))
            keys = held.states("keys")[0]
            query = (query * draft.call.scoring.inner).unflatten(0, (keys.shape[0], -1))
            total = total.unflatten(0, (keys.shape[0], -1))
            found, softcap = self.found[row, ..., : held.tokens], draft.call.scoring.softcap
            self.counts[row] += query.shape[1] * query.shape[2]
            if not self.by_head:
                _record(found, query.flatten(1, 2), total.flatten(1, 2), keys, softcap, self.squares)
                continue
            for head in range(query.shape[1]):
                _record(found[:, head], query[:, head], total[:, head], keys, softcap, self.squares)

    def result(self) -> torch.Tensor:
        """What the policy asks for, float32 ``[B, Hkv, T]``, or ``[B, Hkv, g, T]`` by query head."""
        if not self.squares:
            return self.found
        counts = torch.tensor(self.counts, dtype=torch.float32, device="cpu").clamp_min(1).to(self.found.device)
        return (self.found / counts.view(-1, *[1] * (self.found.dim() - 1))).sqrt()

    def _taken_logarithms(self, draft: Draft) -> torch.Tensor:
        """The logarithms ``[B, 1, q]`` of the lengths of the hidden states; those of one call serve one attention."""
        hidden, self.hidden = self.hidden, None
        if hidden is None:
            raise RuntimeError(
                f"{type(draft.call.module).__name__}: its hidden states were not seen before its attention, which "
                "happens in a compiled model; accepted: the model before torch.compile, or policy 'kvzip'"
            )
        return hidden.clamp_min(torch.finfo(torch.float32).tiny).log()[:, None]

    def _see_hidden(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take note of the lengths of the hidden states that an attention module is given."""
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3:
            raise ValueError(
                f"{type(module).__name__} is not given hidden states [batch, tokens, width], which the policy needs; "
                "accepted here: policy 'kvzip'"
            )
        self.hidden = hidden.float().norm(dim=-1)


def _record(
    found: torch.Tensor,
    query: torch.Tensor,
    total: torch.Tensor,
    keys: torch.Tensor,
    softcap: float | None,
    squares: bool,
) -> None:
    """Raise ``found [Hkv, T]`` to the largest probability of any query, or add the squares of all of them, in place.

    The largest probabilities are ``exp(score - total)``, of all that the queries see. What is squared are probabilities
    over the tokens of the context alone.

    Args:
        found: what is changed.
        query: ``[Hkv, n, D]``, scaled.
        total: ``[Hkv, n]``.
        keys: ``[Hkv, T, D]``.
        softcap: of the scores; None for none.
        squares: whether squares are added.
    """
    step = max(1, _STRIP_ELEMENTS // max(keys.shape[0] * keys.shape[1], 1))
    for start in range(0, query.shape[1], step):
        scores = query[:, start : start + step] @ keys.transpose(-1, -2)
        if softcap is not None:
            scores = scores.tanh_().mul_(softcap)
        if squares:
            found += scores.softmax(-1).square_().sum(1)
        else:
            scores = scores.sub_(total[:, start : start + step, None])
            torch.maximum(found, scores.amax(1).exp_(), out=found)
