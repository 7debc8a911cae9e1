"""Which tokens one layer keeps: what the policy is shown, the scores it gives, and what is kept by them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from hf_kvcache.eviction import Context, Policy
from hf_kvcache.eviction.budget import PinnedPositions
from hf_kvcache.eviction.observations import Observations
from hf_kvcache.eviction.options import Attending, EvictionOptions, LayerPlace
from hf_kvcache.eviction.selection import choose
from hf_kvcache.integration.output_projection import output_weight
from hf_kvcache.integration.rope import LayerRope
from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.gathering import is_tokenwise
from hf_kvcache.storage.token_view import TokenView
from hf_kvcache.storage.transfers import ascending_on

#: Scores are told apart to one in so many.
_SCORE_STEPS = 1 << 14


class Choice(NamedTuple):
    """Which tokens stay.

    Attributes:
        keep: bool ``[b, Hkv, T]``; None if all of them do. Else every sequence, or some, loses tokens; where a policy
            has a threshold, perhaps none does.
        most: tokens that a head keeps at most, on average over the heads of any sequence.
    """

    keep: torch.Tensor | None
    most: int


@dataclass(frozen=True)
class LayerSelection:
    """Chooses among the tokens that a layer holds; made anew for every choice and changes nothing.

    Attributes:
        options: what the layers share.
        place: which layer it is.
        pinned: which tokens are pinned, and where padding stood.
        observations: what the layer remembers of queries.
        attending: what attention showed of the model; None if none of ours has run.
    """

    options: EvictionOptions
    place: LayerPlace
    pinned: PinnedPositions
    observations: Observations
    attending: Attending | None

    @property
    def policy(self) -> Policy:
        return self.options.policy

    def chosen(self, held: TokenView) -> Choice:
        """The tokens that stay. Waits for nothing: how many they are, the host knows without asking the device."""
        policy, storage = self.policy, held.storage
        quota, recent = self.share(held)
        if policy.keeps_above is not None:
            # Which tokens score too little, the device knows; only sinks and tail are known to stay.
            room = held.tokens <= storage.sink_length + storage.tail_length
        elif policy.head_floor is not None:
            room = bool((held.counts.sum(1) <= quota * storage.heads).all())
        else:
            room = bool((held.counts <= quota).all())
        if room:
            return Choice(None, held.tokens)
        keep = self.best(held, quota, recent)
        # Of the newest tokens, these are protected in any case.
        in_tail = max(min(held.used - storage.sink_length, storage.tail_length), 0)
        return Choice(keep, max(quota, self.most_protected(held) + max(recent - in_tail, 0)))

    def share(self, held: TokenView) -> tuple[int, int]:
        """Tokens that a head keeps on average, and how many of them are the newest whatever their scores."""
        least = self.most_protected(held)
        quota = max(self.quota(int(held.rows[0])), least)
        return quota, max(min(self.policy.recent(quota), quota - least + held.storage.tail_length), 0)

    def best(self, held: TokenView, quota: int, recent: int) -> torch.Tensor:
        """bool ``[b, Hkv, T]``: the protected tokens, the newest ``recent``, and those with the best scores."""
        context = self.context(held, quota, self.protected(held, recent))
        policy, scores = self.policy, self.scores(context)
        keep = choose(scores, context.protected, context.held, quota, policy.head_floor, policy.keeps_above)
        if is_tokenwise(held.storage.layout):
            return keep
        return keep & ~held.in_sparse_pages(keep, self.protected(held, 0))

    def most_protected(self, held: TokenView) -> int:
        """The most tokens of a head that :meth:`protected` names if no newest ones are asked for."""
        storage, used = held.storage, held.used
        sinks = min(used, storage.sink_length)
        slots = np.concatenate([np.arange(sinks), np.arange(max(sinks, used - storage.tail_length), used)])
        positions = storage.dense.positions[held.rows[:, None], slots]
        return len(slots) + self.pinned.most_outside(held.rows, positions)

    def quota(self, row: int) -> int:
        """Tokens that a head of sequence ``row`` keeps on average."""
        budget, place, seen = self.options.budget, self.place, int(self.pinned.counts[row])
        return self.policy.layer_quota(
            budget.tokens(seen), place.evicting_index, place.num_evicting, budget.least, seen
        )

    def protected(self, held: TokenView, recent: int) -> torch.Tensor:
        """bool ``[b, Hkv, T]``: sinks, tail, pins, and the newest ``recent`` tokens."""
        storage, used = held.storage, held.used
        sinks = min(used, storage.sink_length)
        newest = max(recent, min(used - sinks, storage.tail_length))
        # Of a head's tokens, sinks are the first and the tail the last.
        number = torch.arange(held.tokens, device=storage.device)
        counts = held.tokens if held.everywhere else held.counts_on_device
        keep = ((number < sinks) | (number >= counts - newest)).expand(held.shape)
        pinned = self.pinned.at(held.rows, held.positions)
        keep = keep if pinned is None else keep | pinned
        return keep if held.everywhere else keep & held.exists

    def context(self, held: TokenView, quota: int, protected: torch.Tensor) -> Context:
        """What the policy sees of the tokens ``held``; padding takes up no positions."""
        policy, device, observations = self.policy, held.storage.device, self.observations
        # All of it copies: a policy may write where it likes without changing the cache, or what is chosen of it.
        keys, values = (_apart(held.storage, states) for states in self.states(held))
        scoring = self.scoring(keys.shape[-1])
        if scoring.sink_logits is not None:
            scoring = replace(scoring, sink_logits=scoring.sink_logits.clone())
        context = Context(
            keys=keys,
            values=values,
            positions=self.pinned.numbers_on_device(held.rows, held.positions),
            held=None if held.everywhere else held.exists.clone(),
            protected=protected.clone(memory_format=torch.contiguous_format),
            seen=int(self.pinned.counts[held.rows[0]]),
            quota=quota,
            scoring=scoring,
            layer=self.place.layer_index,
            layers=self.place.num_layers,
            seed=self.options.seed,
            aligned=held.columns == 0,
            bias=held.bias() if policy.observed else None,
        )
        if policy.needs_rope:
            context.rope = self.rope()
        if policy.needs_output:
            if self._module is None:
                raise self._unknown_module()
            context.output_weight = output_weight(self._module, values.shape[-1]).clone()
        queries = observations.latest_queries(held.rows, policy.observed) if policy.observed else None
        if queries is not None:
            numbers = self.pinned.numbers(held.rows, queries[1])
            context.queries, context.query_positions = queries[0], ascending_on(device, numbers).contiguous()
            context.reach, context.reach_of = partial(_reach, held, queries[1]), queries[0]
        if observations.accumulated is not None:
            by_token = observations.accumulated.by_token(held)
            if policy.needs_hidden:
                context.gated = by_token
            else:
                context.accumulated = by_token
        return context

    def scores(self, context: Context) -> torch.Tensor:
        """What the policy gives the tokens, rounded; it is shown copies of what the choice is then made by."""
        absent = None if context.held is None else context.held.clone()
        scores = self.policy.score(replace(context, protected=context.protected.clone(), held=absent))
        if scores.shape != context.positions.shape:
            raise ValueError(
                f"policy {self.policy.name!r} gave scores of shape {tuple(scores.shape)} for tokens of shape "
                f"{tuple(context.positions.shape)}"
            )
        return round_scores(scores)

    def states(self, held: TokenView) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[b, Hkv, T, D]`` of what is held, as far as the policy looks at them."""
        keys = held.states("keys") if self.policy.needs_states else _no_states(held, "keys")
        values = held.states("values") if self.policy.needs_values else _no_states(held, "values")
        return keys, values

    def attended_keys(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """What queries are scored against, of new keys and values ``[B, Hkv, T, D]``."""
        return keys

    def scoring(self, dim: int) -> Scoring:
        """How queries are scored; as most models do, where no attention of ours has said it."""
        return Scoring(dim**-0.5) if self.attending is None else self.attending.scoring

    def rope(self) -> LayerRope:
        """The layer's rotary embedding; raises ValueError where the attention module is not known."""
        rope = None if self.attending is None else self.attending.rope()
        if rope is None:
            raise self._unknown_module()
        return rope

    def _unknown_module(self) -> ValueError:
        return ValueError(
            f"policy {self.policy.name!r} needs the attention module of layer {self.place.layer_index}, which is not "
            "known: the cache was unpickled, or its model is gone. Call compress() before a cache is pickled"
        )

    @property
    def _module(self) -> torch.nn.Module | None:
        return None if self.attending is None else self.attending.module


def round_scores(scores: torch.Tensor) -> torch.Tensor:
    """``scores`` to some digits, so that tokens that are equal but for rounding are equal, and the newer one stays.

    In the first layer all occurrences of a token have one key but for its rotation. Which of them stays must not depend
    on the last bit, which a matrix product of several tokens (a draft) computes otherwise than one of a single token.
    """
    mantissa, exponent = torch.frexp(scores.float())
    return torch.ldexp((mantissa * _SCORE_STEPS).round() / _SCORE_STEPS, exponent)


def _reach(held: TokenView, at: np.ndarray, number: int) -> int:
    """How many of a head's tokens, from the first on, hold all that a query sees, in the head where they are most.

    Tokens in pages count in any case: the host does not look for theirs that are newer than the query.

    Args:
        held: the tokens.
        at: int64 ``[b, n]``, the positions of the queries.
        number: which of the queries.
    """
    newer = held.used
    for row, query in zip(held.rows, at[:, number], strict=True):
        positions = held.storage.dense.positions[row, : held.used]
        newer = min(newer, held.used - int(positions.searchsorted(query, side="right")))
    return held.tokens - newer


def _no_states(held: TokenView, side: str) -> torch.Tensor:
    """Zeros ``[b, Hkv, T, D]`` that take no memory, for a policy that does not look at them."""
    dim = held.storage.layout.sides[side].dim
    return torch.zeros(1, dtype=torch.float32, device=held.storage.device).expand(*held.shape, dim)


def _apart(storage: PagedStorage, states: torch.Tensor) -> torch.Tensor:
    """``states``, copied if they are the dense buffer itself: float32 of which nothing is packed."""
    buffers = (storage.dense.keys, storage.dense.values)
    shared = any(states.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr() for buffer in buffers)
    return states.clone() if shared else states
