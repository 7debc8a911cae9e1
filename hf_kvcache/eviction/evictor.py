"""How one layer keeps within its budget: a policy scores the tokens held, and those not chosen are dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hf_kvcache.eviction import Policy
from hf_kvcache.eviction.accumulated import AccumulatedAttention
from hf_kvcache.eviction.budget import PinnedPositions
from hf_kvcache.eviction.compensation import compensate_values
from hf_kvcache.eviction.layer_selection import Choice, LayerSelection
from hf_kvcache.eviction.matching import match_attention
from hf_kvcache.eviction.observations import Observations
from hf_kvcache.eviction.options import Attending, EvictionOptions, LayerPlace
from hf_kvcache.eviction.schedule import EvictionSchedule
from hf_kvcache.eviction.sinks import MovingSinks
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.pruning import KeptTokens, PrunePlan, carry_out, plan, read_back
from hf_kvcache.storage.token_view import TokenView
from hf_kvcache.storage.transfers import front, to_host
from hf_kvcache.utils.autocast import without_autocast


@dataclass(frozen=True)
class Change:
    """What a choice does to some sequences.

    Attributes:
        plan: which tokens will lie in pages.
        sums: the accumulated attention ``[b, Hkv, T]`` of the tokens held before; None if there is none.
    """

    plan: PrunePlan
    sums: torch.Tensor | None


class Evictor:
    """Keeps one layer within its budget.

    Args:
        options: what the layers share.
        place: which layer it is.
        storage: the layer's tokens.
        selection: the class that chooses among the tokens held.

    Attributes:
        schedule: when tokens are chosen.
        observations: what is remembered of queries for the next choice.
        pinned: which tokens are pinned, and where padding stood.
        sinks: where the keys of the sinks were moved to, for a policy that moves them.
        attending: what attention showed of the model; None before it has.
    """

    def __init__(
        self,
        options: EvictionOptions,
        place: LayerPlace,
        storage: PagedStorage,
        selection: type[LayerSelection] = LayerSelection,
    ) -> None:
        self.options, self.place = options, place
        self.pinned: PinnedPositions = options.pins.by_row(storage.batch)
        self.observations = Observations(options.policy.observed, options.compensated_queries)
        self.schedule = EvictionSchedule(options)
        self.attending: Attending | None = None
        self._selection = selection
        self.sinks = MovingSinks(storage.batch)

    @property
    def policy(self) -> Policy:
        """Scores the tokens."""
        return self.options.policy

    @property
    def stateful(self) -> bool:
        """Whether choices depend on queries."""
        return bool(self.observations.wanted or self.observations.fitted) or self.policy.needs_accumulated

    @property
    def evictions(self) -> int:
        """Choices that dropped something."""
        return self.schedule.evictions

    @property
    def evicted_at(self) -> int:
        """Tokens seen at the latest choice that dropped something."""
        return self.schedule.evicted_at

    def selection(self) -> LayerSelection:
        """An object that chooses among the tokens held, by all that the evictor knows now."""
        return self._selection(self.options, self.place, self.pinned, self.observations, self.attending)

    # -- observing ------------------------------------------------------------------------------------------------

    def note(self, position: int, length: int, valid: np.ndarray | None, drafted: bool = False) -> None:
        """Take note of ``length`` tokens from ``position`` on; ``valid [B, length]`` is False for padding.

        Those that are ``drafted`` are evicted as if they came one by one; others, if there are several, as a prompt.
        """
        self.pinned.see(position, length, valid)
        self.schedule.note(position, length, drafted)

    def observe_first(
        self,
        storage: PagedStorage,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        valid: np.ndarray | None,
    ) -> None:
        """Add the attention of a first update to its own keys, where it was computed elsewhere."""
        selection = self.selection()
        keys = selection.attended_keys(keys, values)
        with without_autocast(storage.device):
            self.observations.add_prompt(storage, query, keys, valid, selection.scoring(keys.shape[-1]))

    # -- evicting -------------------------------------------------------------------------------------------------

    def flush_update(self, storage: PagedStorage, seen: int) -> None:
        """Evict, or only pack, what the latest update made due, after ``seen`` tokens in all."""
        action = self.schedule.after_update()
        if action == "due":
            self.flush_due(storage, seen)
        elif action == "choose":
            self.evict(storage, np.arange(storage.batch), seen)
        elif action == "pack":
            self.pack(storage, np.arange(storage.batch), seen)
            self.schedule.pending = False

    def flush_due(self, storage: PagedStorage, seen: int) -> None:
        """Evict, or only pack, the sequences whose tail has grown by ``interval`` tokens, or by a page's."""
        due = self.schedule.due(storage)
        if len(due) == 0:
            return
        if self.options.interval is None:
            self.pack(storage, due, seen)
        else:
            self.evict(storage, due, seen)

    def evict(self, storage: PagedStorage, rows: np.ndarray, seen: int) -> None:
        """Choose the tokens that the sequences ``rows`` keep, after ``seen`` tokens in all, and drop the others.

        Waits for the device once, and not at all where nothing has to be dropped.
        """
        selection = self.selection()
        held = [TokenView.of(storage, group) for group in _groups(self.pinned, storage, rows)]
        with without_autocast(storage.device):
            self._prune(storage, [self._change(each, selection.chosen(each)) for each in held], seen)
        self._end_choice()

    def pack(self, storage: PagedStorage, rows: np.ndarray, seen: int) -> None:
        """Pack the tokens of the sequences ``rows`` that are due; drop none."""
        held = [TokenView.of(storage, group) for group in _groups(self.pinned, storage, rows)]
        self._prune(storage, [self._change(each, Choice(None, each.tokens)) for each in held], seen)

    def keep_only(
        self,
        storage: PagedStorage,
        keep: list[torch.Tensor],
        seen: int,
        reference: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        """Drop every token held that is not named.

        Args:
            storage: the layer's tokens.
            keep: for each sequence bool ``[1, Hkv, T]``, the tokens that stay.
            seen: tokens seen in all.
            reference: for each sequence queries ``[1, Hq, n, Dk]`` that see all tokens held, to whose attention the
                kept tokens are fitted; None to keep them as they are.
        """
        selection, views = self.selection(), [TokenView.of(storage, np.array([row])) for row in range(len(keep))]
        masks = [
            (mask.to(storage.device) | selection.protected(held, 0)) & held.exists
            for mask, held in zip(keep, views, strict=True)
        ]
        # Nobody knows yet how many these are: this waits for the device once more.
        counts = to_host(torch.cat([mask.sum(-1) for mask in masks]))
        changes = []
        for held, mask, count in zip(views, masks, counts, strict=True):
            choice = Choice(None if (count == held.counts[0]).all() else mask, int(count.max(initial=0)))
            changes.append(self._change(held, choice))
        if reference is None and self.policy.needs_replay:
            reference = [None] * len(changes)
        with without_autocast(storage.device):
            self._prune(storage, changes, seen, reference)
        self._end_choice()

    # -- going back, copies ----------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # A model does not go along with a cache. Of its module, the next choice may need the rotary embedding.
        needed = self.policy.needs_rope or self.policy.moves_sinks
        attending = None if self.attending is None else self.attending.without_module(needed)
        return self.__dict__ | {"attending": attending}

    def forget(self, removed: np.ndarray, slots: np.ndarray, seen: int) -> None:
        """Forget the last ``removed [B]`` tokens; ``slots [B]`` slots of the dense buffer are still in use."""
        self.pinned.forget(removed, seen)
        self.observations.forget(removed, slots)
        self.schedule.return_to(seen)

    def return_to(self, seen: int, storage: PagedStorage, observed: bool) -> None:
        """Forget all behind the first ``seen`` tokens, and their queries too if those were ``observed``."""
        removed = np.maximum(self.pinned.counts - self.pinned.counts_at(seen), 0)
        self.pinned.forget(removed, seen)
        self.observations.forget(removed if observed else np.zeros_like(removed), storage.dense.lengths)
        self.schedule.return_to(seen)

    def select(self, rows: np.ndarray) -> Evictor:
        """A copy with the sequences ``rows`` only, which may repeat."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.pinned, other.observations = self.pinned.select(rows), self.observations.select(rows)
        other.schedule, other.sinks = replace(self.schedule), self.sinks.select(rows)
        return other

    def tensors(self) -> list[torch.Tensor]:
        """All tensors held: queries, accumulated attention, and the original keys of moved sinks."""
        return [*self.observations.tensors(), *self.sinks.state().values()]

    # -- internals ------------------------------------------------------------------------------------------------

    def kept_tokens(self, plans: list[PrunePlan]) -> list[KeptTokens]:
        """What the host has to know of the plans. Waits for the device once, if any tokens are dropped."""
        return read_back(plans)

    def _change(self, held: TokenView, choice: Choice) -> Change:
        """What dropping all but the chosen tokens means; waits for nothing and changes nothing."""
        accumulated = self.observations.accumulated
        sums = None if accumulated is None else accumulated.by_token(held)
        tail = self.schedule.tail(held, choice.keep is not None)
        return Change(plan(held, choice.keep, tail, choice.most), sums)

    def _end_choice(self) -> None:
        """Forget what only the choice that was made has looked at."""
        self.schedule.pending = False
        self.observations.block = None
        if self.options.interval is None and self.options.evict_prefill is None:
            # Nothing will be chosen unless asked for: what comes next is remembered for that.
            self.observations.latest = None

    def _prune(
        self,
        storage: PagedStorage,
        changes: list[Change],
        seen: int,
        reference: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        """Drop the tokens that no change keeps, pack those that leave the tail; sums move with their keys.

        Args:
            storage: the layer's tokens.
            changes: those of some sequences.
            seen: tokens seen in all.
            reference: for each change, queries that kept tokens are fitted to, or None to keep them as they are. The
                latest queries if this is None, where the options ask for that.
        """
        kept_tokens = self.kept_tokens([change.plan for change in changes])
        for number, (change, kept) in enumerate(zip(changes, kept_tokens, strict=True)):
            held, keep, bias = change.plan.held, change.plan.keep, None
            if keep is not None and kept.drops(change.plan):
                self.schedule.note_eviction(seen)
                if self.options.compensate:
                    count = self.options.compensated_queries
                    latest = self.observations.latest_queries(held.rows, count) if reference is None else None
                    queries = (None, None) if reference is None else (reference[number], None)
                    bias = _fit(self.selection(), held, keep, kept.most(change.plan), *(latest or queries))
            carry_out(change.plan, kept, bias)
            if self.policy.moves_sinks:
                gone = self.pinned.counts - storage.tokens()
                self.sinks.move(storage, self.selection().rope(), held.rows, gone[held.rows])
            if self.observations.accumulated is not None:
                _move_sums(self.observations.accumulated, storage, change)


def _fit(
    selection: LayerSelection,
    held: TokenView,
    keep: torch.Tensor,
    most: int,
    query: torch.Tensor | None,
    at: np.ndarray | None,
) -> torch.Tensor | None:
    """Fit the kept tokens that are not packed yet to the attention of some queries, as the options say.

    Args:
        selection: knows the options, and which tokens stay as they are.
        held: the tokens of some sequences.
        keep: bool ``[b, Hkv, T]``, which of them stay.
        most: how many the head keeps that keeps most.
        query: ``[b, Hq, n, Dk]``; None to fit nothing.
        at: int64 ``[b, n]``, positions of the queries; None if they see all tokens.

    Returns:
        float16 ``[b, Hkv, slots]``, the bias of each token of the dense buffer; None if there is none.
    """
    if query is None:
        return None
    scoring, fixed = selection.scoring(query.shape[-1]), selection.protected(held, 0)
    if selection.options.matches:
        return match_attention(held, keep, fixed, query, at, scoring, most)
    assert at is not None
    compensate_values(held, keep, fixed, query, at, scoring, most)
    return None


def _groups(pinned: PinnedPositions, storage: PagedStorage, rows: np.ndarray) -> Iterator[np.ndarray]:
    """``rows`` in groups that hold equally many tokens: all together without padding, else one by one."""
    if len(rows) == 0:
        return
    lengths = storage.dense.lengths[rows]
    if not pinned.padded and (lengths == lengths[0]).all():
        yield rows
    else:
        yield from rows[:, None]


def _move_sums(accumulated: AccumulatedAttention, storage: PagedStorage, change: Change) -> None:
    """Put the sums of kept tokens where these lie now."""
    keep, sums, after = change.plan.keep, change.sums, TokenView.of(storage, change.plan.held.rows)
    assert sums is not None
    if keep is not None:
        sums = sums.gather(2, front(keep, after.tokens))
    accumulated.put(after, sums)
    accumulated.trim(storage.dense.capacity, storage.table.columns * storage.page_size)
