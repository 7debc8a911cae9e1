"""What one layer does to keep within its budget: it shows a policy what is held and drops what is not chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from hf_kvcache.eviction import Context, Policy
from hf_kvcache.eviction.base import ALL_QUERIES
from hf_kvcache.eviction.budget import PinnedPositions
from hf_kvcache.eviction.compensating import make_up
from hf_kvcache.eviction.observations import AccumulatedAttention, LatestQueries, Observations
from hf_kvcache.eviction.options import Attending, EvictionOptions, LayerPlace
from hf_kvcache.eviction.selection import choose
from hf_kvcache.eviction.sinks import MovingSinks
from hf_kvcache.integration.output_projection import output_weight
from hf_kvcache.integration.rope import LayerRope, rope_of
from hf_kvcache.kernels.inputs import Attention, Scoring
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.gathering import is_tokenwise
from hf_kvcache.storage.pruning import keep_only
from hf_kvcache.storage.token_view import TokenView

#: Latest queries that are remembered while decoding for a policy that wants all of an update's.
_DECODED_QUERIES = 64

#: Scores are told apart to one in so many.
_SCORE_STEPS = 1 << 14


class Evictor:
    """Keeps one layer within its budget.

    Args:
        options: what the layers share.
        place: which layer it is.
        storage: the layer's tokens.
    """

    def __init__(self, options: EvictionOptions, place: LayerPlace, storage: PagedStorage) -> None:
        self.options, self.place = options, place
        self.pinned: PinnedPositions = options.pins.by_row(storage.batch)
        self.seen = Observations()
        self.attending: Attending | None = None
        #: A prompt is held that was not evicted yet.
        self.pending = False
        #: Choices that dropped something, and tokens seen at the latest of them.
        self.evictions = 0
        self.evicted_at = 0
        self._padded = False
        self._sinks = MovingSinks(storage.batch)

    @property
    def policy(self) -> Policy:
        return self.options.policy

    @property
    def observed(self) -> int:
        """Latest queries that are remembered; ``ALL_QUERIES`` for all of an update."""
        wanted = self.policy.observed
        return wanted if wanted == ALL_QUERIES else max(wanted, self.options.compensate)

    @property
    def stateful(self) -> bool:
        """Whether choices depend on queries."""
        return bool(self.observed) or self.policy.needs_accumulated

    # -- observing ------------------------------------------------------------------------------------------------

    def note(self, position: int, length: int, valid: np.ndarray | None, drafted: bool = False) -> None:
        """Take note of ``length`` tokens from ``position`` on, of which ``valid [B, length]`` are real.

        Those that are ``drafted`` are evicted as if they came one by one; others, if there are several, as a prompt.
        """
        self.pinned.see(position, length, valid)
        self._padded |= valid is not None
        self.pending |= position == 0 or (length > 1 and not drafted)

    def observe_queries(
        self, query: torch.Tensor, position: int, valid: np.ndarray | None, drafted: bool = False
    ) -> None:
        """Remember ``query [B, Hq, n, D]`` from ``position`` on, as far as the policy wants it."""
        wanted = self.observed
        if not wanted:
            return
        query = query.detach()
        if self.seen.latest is None:
            self.seen.latest = LatestQueries.of(query, _DECODED_QUERIES if wanted == ALL_QUERIES else wanted)
        self.seen.latest.see(query, position, valid)
        whole = wanted == ALL_QUERIES and query.shape[2] > 1 and not drafted
        self.seen.block = (query, position, valid) if whole else None

    def observe_sums(self, storage: PagedStorage, attention: Attention, fresh: int, valid: np.ndarray | None) -> None:
        """Add what one call of attention gave each key; its last ``fresh`` full-precision tokens are not stored yet."""
        accumulated, dense = self._accumulated(storage), attention.dense_sums
        assert dense is not None
        stored = dense.shape[2] - fresh
        if storage.dense.uniform_length is not None and valid is None:
            accumulated.add(dense, attention.page_sums)
            return
        accumulated.add(dense[:, :, :stored], attention.page_sums)
        averaged = dense[:, :, stored:].unflatten(1, (storage.heads, -1)).mean(2)
        for row in range(storage.batch if fresh else 0):
            real = np.arange(fresh) if valid is None else np.flatnonzero(valid[row])
            new = averaged[row : row + 1][:, :, torch.from_numpy(real).to(dense.device)]
            empty = new.new_zeros(1, storage.heads, int(storage.dense.lengths[row]))
            accumulated.add_rows(np.array([row]), torch.cat([empty, new], 2))

    def observe_first(
        self, storage: PagedStorage, query: torch.Tensor, keys: torch.Tensor, valid: np.ndarray | None
    ) -> None:
        """Add what a first update gave each of its ``keys``, where its attention was computed elsewhere."""
        accumulated = self._accumulated(storage)
        assert self.attending is not None
        for row in range(storage.batch):
            real = torch.arange(keys.shape[2]) if valid is None else torch.from_numpy(np.flatnonzero(valid[row]))
            if len(real) == 0:
                continue  # all of it is padding
            index, row_keys = real.to(keys.device), keys[row : row + 1][:, :, real.to(keys.device)].float()
            context = self._context(
                row_keys, row_keys, index.expand(1, storage.heads, -1), None, keys.shape[2], quota=0
            )
            context.queries, context.query_positions = query[row : row + 1][:, :, index], index
            accumulated.add_rows(np.array([row]), context.received().mean(2))

    def _accumulated(self, storage: PagedStorage) -> AccumulatedAttention:
        if self.seen.accumulated is None:
            self.seen.accumulated = AccumulatedAttention.of(storage)
        return self.seen.accumulated

    # -- evicting -------------------------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether a prompt is held that nobody may choose from, or pack, before ``compress()``."""
        return self.pending and self.options.evict_prefill is None and self.options.interval is None

    def room(self, storage: PagedStorage) -> int:
        """Tokens that can be added before a sequence is due; at least 1."""
        return 1 << 30 if self.waits else max(1, self._full(storage) - storage.dense.longest)

    def flush_due(self, storage: PagedStorage, seen: int) -> None:
        """Evict, or only pack, the sequences whose tail has grown by ``interval`` tokens, or by a page's."""
        due = np.flatnonzero(storage.dense.lengths >= self._full(storage))
        if len(due) == 0 or self.waits:
            return
        if self.options.interval is None:
            self.pack(storage, due, seen)
        else:
            self.evict(storage, due, seen)

    def _step(self, storage: PagedStorage) -> int:
        """Tokens by which a tail grows before some of it is packed."""
        return self.options.interval or storage.page_size

    def _full(self, storage: PagedStorage) -> int:
        """Slots that a sequence uses when it is due."""
        return storage.sink_length + storage.tail_length + self._step(storage)

    def evict(self, storage: PagedStorage, rows: np.ndarray, seen: int) -> None:
        """Choose what the sequences ``rows`` keep, after ``seen`` tokens in all, and drop the rest."""
        for group in self._groups(storage, rows):
            held = TokenView.of(storage, group)
            keep = self._chosen(held)
            queries = self._queries(group) if self.options.compensate else None
            if queries is not None and not (keep == held.exists).all():
                query, at = self._latest(queries, self.options.compensate)
                make_up(held, keep, self.protected(held, 0), query, at, self._scoring(query.shape[-1]))
            self._apply(storage, held, keep, seen)
        self.pending = False
        self.seen.block = None
        if self.options.interval is None and self.options.evict_prefill is None:
            self.seen.latest = None  # nothing will be chosen unless asked for: what comes next is remembered for that

    def pack(self, storage: PagedStorage, rows: np.ndarray, seen: int) -> None:
        """Pack what may be packed of the sequences ``rows`` and drop nothing."""
        for group in self._groups(storage, rows):
            held = TokenView.of(storage, group)
            self._apply(storage, held, held.exists, seen)

    def keep_only(self, storage: PagedStorage, keep: list[torch.Tensor], seen: int) -> None:
        """Drop every token that ``keep``, bool ``[1, Hkv, T]`` for each sequence, does not name, of those held."""
        for row, mask in enumerate(keep):
            held = TokenView.of(storage, np.array([row]))
            self._apply(storage, held, mask.cpu().numpy() | self.protected(held, 0), seen)
        self.pending = False

    def quota(self, row: int) -> int:
        """Tokens that a head of sequence ``row`` keeps on average."""
        budget, seen = self.options.budget, int(self.pinned.real[row])
        return self.policy.layer_quota(budget.tokens(seen), self.place.place, self.place.places, budget.least, seen)

    def protected(self, held: TokenView, recent: int) -> np.ndarray:
        """bool ``[b, Hkv, T]``: sinks, tail, pins, and the newest ``recent`` tokens."""
        storage, used = held.storage, held.used
        in_buffer = held.slots < used
        keep = in_buffer & ((held.slots < storage.sink_length) | (held.slots >= used - storage.tail_length))
        number = np.arange(held.tokens)
        keep |= number >= held.exists.sum(-1, keepdims=True) - recent
        return (keep | self.pinned.at(held.rows, held.positions)) & held.exists

    def context(self, held: TokenView, quota: int, protected: np.ndarray) -> Context:
        """What the policy sees of the tokens ``held``; padding takes up no positions."""
        policy, device = self.policy, held.storage.device
        # All of it copies: a policy may write where it likes without changing the cache, or what is chosen of it.
        keys, values = (_apart(held.storage, states) for states in self.states(held))
        exists = None if held.exists.all() else torch.tensor(held.exists, device=device)
        positions = torch.tensor(self._numbers(held.rows, held.positions), device=device)
        seen = int(self.pinned.real[held.rows[0]])
        context = self._context(keys, values, positions, exists, seen, quota)
        context.protected = torch.tensor(protected, device=device)
        if context.scoring.sink_logits is not None:
            context.scoring = replace(context.scoring, sink_logits=context.scoring.sink_logits.clone())
        module = None if self.attending is None else self.attending.module
        if policy.needs_rope:
            context.rope = self.rope()
        if policy.needs_output:
            context.output_weight = output_weight(module, values.shape[-1]).clone()
        queries = self._queries(held.rows)
        if queries is not None and policy.observed:
            context.queries, at = self._latest(queries, policy.observed)
            context.query_positions = torch.tensor(self._numbers(held.rows, at), device=device)
        if self.seen.accumulated is not None:
            context.accumulated = self.seen.accumulated.by_token(held)
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
        return _rounded(scores)

    def states(self, held: TokenView) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[b, Hkv, T, D]`` of what is held, as far as the policy looks at them."""
        keys = held.states("keys") if self.policy.needs_states else _no_states(held, "keys")
        values = held.states("values") if self.policy.needs_values else _no_states(held, "values")
        return keys, values

    def attended_keys(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """What queries are scored against, of new keys and values ``[B, Hkv, T, D]``."""
        return keys

    def forget(self, removed: np.ndarray, slots: np.ndarray, seen: int) -> None:
        """Take note that the last ``removed [B]`` tokens are gone, and only ``slots [B]`` dense slots still in use."""
        self.pinned.forget(removed, seen)
        self.seen.forget(removed, slots)
        self.evicted_at = min(self.evicted_at, seen)

    def return_to(self, seen: int, storage: PagedStorage, observed: bool) -> None:
        """:meth:`forget` all behind the first ``seen`` tokens; were the queries of the others ``observed``?"""
        real = seen - np.array([np.searchsorted(row, seen) for row in self.pinned.padding])
        removed = np.maximum(self.pinned.real - real, 0)
        self.pinned.forget(removed, seen)
        self.seen.forget(removed if observed else np.zeros_like(removed), storage.dense.lengths)
        self.evicted_at = min(self.evicted_at, seen)

    def select(self, rows: np.ndarray) -> Evictor:
        """The same for the sequences ``rows`` of these; also a copy."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.pinned, other.seen = self.pinned.select(rows), self.seen.select(rows)
        other._sinks = self._sinks.select(rows)
        return other

    def tensors(self) -> list[torch.Tensor]:
        """What is remembered of queries, and where sinks stood at first."""
        block = [] if self.seen.block is None else [self.seen.block[0]]
        return [*self.seen.state().values(), *block, *self._sinks.state().values()]

    def state(self) -> dict[str, torch.Tensor]:
        """What the next choice depends on, as tensors by name.

        Raises:
            ValueError: while a prompt waits to be evicted, since the queries that are then looked at are not saved.
        """
        if self.pending:
            raise ValueError("a prompt waits to be evicted; call compress() before the cache is saved")
        state = {f"seen.{name}": tensor.clone() for name, tensor in self.seen.state().items()}
        state["pinned"] = torch.from_numpy(self.pinned.mask.copy())
        state["real"] = torch.from_numpy(self.pinned.real.copy())
        state["padding"] = torch.from_numpy(np.concatenate(self.pinned.padding))
        state["padding_lengths"] = torch.tensor([len(row) for row in self.pinned.padding])
        state["counters"] = torch.tensor([self.evictions, self.evicted_at, self._padded])
        return state | {f"sinks.{name}": tensor.clone() for name, tensor in self._sinks.state().items()}

    def restore(self, state: dict[str, torch.Tensor], device: torch.device) -> None:
        """Take over what :meth:`state` returned.

        Raises:
            ValueError: if something in it is of other sequences or tokens than the rest.
        """
        batch = len(self.pinned.real)
        state = {name: x if x.is_floating_point() else x.cpu() for name, x in state.items()}
        for name, tensor in state.items():
            if name.startswith("seen.") and tensor.shape[0] != batch:
                raise ValueError(f"'evictor.{name}' is of {tensor.shape[0]} sequences; accepted: {batch}")
        if int(state["padding_lengths"].sum()) != len(state["padding"]):
            raise ValueError("'evictor.padding' does not go with 'evictor.padding_lengths'")
        self.seen = Observations.of_state(_part(state, "seen."), device)
        self._sinks.restore(_part(state, "sinks."), device)
        self.pinned.mask, self.pinned.real = state["pinned"].numpy().copy(), state["real"].numpy().copy()
        padding, lengths = (state[name].numpy() for name in ("padding", "padding_lengths"))
        self.pinned.padding = np.split(padding.copy(), lengths.cumsum()[:-1])
        self.evictions, self.evicted_at, padded = state["counters"].tolist()
        self._padded = bool(padded)

    # -- internals ------------------------------------------------------------------------------------------------

    def _chosen(self, held: TokenView) -> np.ndarray:
        policy, row = self.policy, int(held.rows[0])
        counts = held.exists.sum(-1)
        hard = self.protected(held, 0)
        quota = max(self.quota(row), int(hard.sum(-1).max(initial=0)))
        if (counts <= quota).all():
            return held.exists
        recent = min(policy.recent(quota), quota - int(hard.sum(-1).max(initial=0)) + held.storage.tail_length)
        protected = self.protected(held, max(recent, 0))
        context = self.context(held, quota, protected)
        scores = self.scores(context)
        keep = choose(scores, context.protected, context.held, quota, policy.head_floor).cpu().numpy()
        return keep if is_tokenwise(held.storage.layout) else keep & ~held.in_sparse_pages(keep, hard)

    def _apply(self, storage: PagedStorage, held: TokenView, keep: np.ndarray, seen: int) -> None:
        accumulated = None if self.seen.accumulated is None else self.seen.accumulated.by_token(held)
        if not (keep == held.exists).all():
            self.evictions += 1
            self.evicted_at = seen
        keep_only(held, keep, self._tail(storage, held, keep))
        if self.policy.moves_sinks:
            dropped = self.pinned.real - storage.tokens()
            self._sinks.move(storage, self.rope(), held.rows, dropped[held.rows])
        if accumulated is None or self.seen.accumulated is None:
            return
        after = TokenView.of(storage, held.rows)
        order = torch.from_numpy(np.argsort(~keep, axis=-1, kind="stable")[..., : after.tokens].copy())
        self.seen.accumulated.put(after, accumulated.gather(2, order.to(accumulated.device)))
        columns = int(storage.table.lengths.max(initial=0))
        self.seen.accumulated.trim(storage.dense.capacity, columns * storage.page_size)

    def _tail(self, storage: PagedStorage, held: TokenView, keep: np.ndarray) -> int:
        """Tokens that stay in the tail; where nothing is dropped, as many as if tokens had come one by one.

        So the tokens at which evictions fall due do not depend on how many tokens an update has.
        """
        least = storage.tail_length
        if not (keep == held.exists).all():
            return least
        return least + max(held.used - storage.sink_length - least, 0) % self._step(storage)

    def _groups(self, storage: PagedStorage, rows: np.ndarray) -> Iterator[np.ndarray]:
        """``rows`` in groups that stand alike: all together without padding, else one by one."""
        if len(rows) == 0:
            return
        lengths = storage.dense.lengths[rows]
        if not self._padded and (lengths == lengths[0]).all():
            yield rows
        else:
            yield from rows[:, None]

    def _numbers(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """``positions [b, ...]`` as they would be without padding."""
        return self.pinned.numbers(rows, positions) if self._padded else positions

    def _queries(self, rows: np.ndarray) -> tuple[torch.Tensor, np.ndarray] | None:
        """Queries ``[b, Hq, n, D]`` that the policy wants, and their positions ``[b, n]``."""
        if self.seen.block is not None:
            query, position, valid = self.seen.block
            index = torch.from_numpy(rows).to(query.device)
            if valid is None:
                return query[index], np.tile(position + np.arange(query.shape[2]), (len(rows), 1))
            real = np.flatnonzero(valid[rows[0]])
            return query[index][:, :, torch.from_numpy(real).to(query.device)], position + real[None]
        return None if self.seen.latest is None else self.seen.latest.latest(rows)

    @staticmethod
    def _latest(queries: tuple[torch.Tensor, np.ndarray], count: int) -> tuple[torch.Tensor, np.ndarray]:
        """The last ``count`` of the queries and positions that :meth:`_queries` returned."""
        last = slice(None) if count == ALL_QUERIES else slice(-count, None)
        return queries[0][:, :, last], queries[1][:, last]

    def _scoring(self, dim: int) -> Scoring:
        """How queries are scored; as most models do, where no attention of ours has said it."""
        return Scoring(dim**-0.5) if self.attending is None else self.attending.scoring

    def _context(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        held: torch.Tensor | None,
        seen: int,
        quota: int,
    ) -> Context:
        return Context(
            keys=keys,
            values=values,
            positions=positions,
            held=held,
            protected=torch.zeros(positions.shape, dtype=torch.bool, device=keys.device),
            seen=seen,
            quota=quota,
            scoring=self._scoring(keys.shape[-1]),
            layer=self.place.layer,
            layers=self.place.layers,
            seed=self.options.seed,
        )

    def rope(self) -> LayerRope:
        """The layer's rotary embedding; raises ValueError where there is none that is known."""
        module = None if self.attending is None else self.attending.module
        if module is None:
            raise ValueError(f"policy {self.policy.name!r} needs the attention module, which is not known")
        return rope_of(module)


def _no_states(held: TokenView, side: str) -> torch.Tensor:
    """Zeros ``[b, Hkv, T, D]`` that take no memory, for a policy that does not look at them."""
    dim = held.storage.layout.sides[side].dim
    return torch.zeros(1, device=held.storage.device).expand(*held.exists.shape, dim)


def _rounded(scores: torch.Tensor) -> torch.Tensor:
    """``scores`` to some digits, so that tokens that are equal but for rounding are equal, and the newer one stays.

    In the first layer all occurrences of a token have one key but for its rotation. Which of them stays must not depend
    on the last bit, which a matrix product of several tokens (a draft) computes otherwise than one of a single token.
    """
    mantissa, exponent = torch.frexp(scores.float())
    return torch.ldexp((mantissa * _SCORE_STEPS).round() / _SCORE_STEPS, exponent)


def _apart(storage: PagedStorage, states: torch.Tensor) -> torch.Tensor:
    """``states``, copied if they are the dense buffer itself: float32 of which nothing is packed."""
    buffers = (storage.dense.keys, storage.dense.values)
    shared = any(states.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr() for buffer in buffers)
    return states.clone() if shared else states


def _part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
