"""A cache layer that keeps within a budget of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hf_kvcache.eviction.evictor import Evictor
from hf_kvcache.eviction.options import Attending, EvictionOptions, LayerPlace
from hf_kvcache.integration.architecture import architecture
from hf_kvcache.integration.binding import is_bound
from hf_kvcache.integration.versions import RELEASE
from hf_kvcache.kernels.inputs import Attention, Scoring
from hf_kvcache.layers.base import CANNOT_TAKE_BACK, MAX_UNCONFIRMED, KVCacheLayer, LayerOptions
from hf_kvcache.layers.new_tokens import NewTokens, dense_tokens
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.gathering import can_drop_tokens
from hf_kvcache.storage.token_view import TokenView


@dataclass
class Draft:
    """An update that may be rolled back: what it takes to do it again with fewer tokens."""

    new: NewTokens
    query: torch.Tensor
    mask: torch.Tensor | None
    scoring: Scoring
    causal: bool
    first: bool

    def part(self, tokens: slice) -> Draft:
        """Some of its tokens, not stored yet."""
        mask = _rows_of(self.mask, tokens, self.new.length)
        return replace(self, new=self.new.part(tokens), query=self.query[:, :, tokens], mask=mask)


@dataclass
class Undo:
    """What a layer was before the drafts that followed."""

    storage: PagedStorage | None
    evictor: Evictor | None
    seen: int
    drafts: list[Draft]


class EvictingLayer(KVCacheLayer):
    """One attention layer's cache within a budget: an :class:`Evictor` drops tokens after attention has used them.

    While tokens may be rolled back, eviction goes on as it would in plain decoding, on a copy: pages are shared and
    the dense buffer is small. ``crop`` returns to what was before the drafts and does again those that were accepted.

    Args:
        index: number of the layer in the model.
        options: what the layers of the cache share.
        eviction: how they evict.
        place: which layer it is, in the model and among those that evict.
    """

    evicts = True

    def __init__(self, index: int, options: LayerOptions, eviction: EvictionOptions, place: LayerPlace) -> None:
        super().__init__(index, options)
        self.eviction, self.place = eviction, place
        self.evictor: Evictor | None = None
        #: Told of every call of attention over tokens held: the update and the log-sum-exp ``[B, Hq, q]``.
        self.watcher: Callable[[Draft, torch.Tensor], None] | None = None
        self._undo: Undo | None = None
        self._attended = True

    optional_tensors = ("evictor.seen.", "evictor.sinks.")

    # -- transformers' contract -----------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        interval = self.eviction.interval
        storage = self.make_storage(key_states, value_states, self.options.sink_length, interval)
        if not can_drop_tokens(storage.layout):
            raise ValueError(
                f"codec={self.options.codec!r} shares scales among some tokens of a page of {self.options.page_size}; "
                "accepted with eviction: codecs with a scale per token or per page (page_size equal to the group)"
            )
        self.evictor = self.make_evictor(storage)
        self.storage = storage
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def make_evictor(self, storage: PagedStorage) -> Evictor:
        """What chooses the tokens of ``storage`` that stay."""
        return Evictor(self.eviction, self.place, storage)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._attended:
            raise self._not_attended()
        self._flush_prefill(key_states.shape[2])
        if self.record_past and self._unconfirmed > MAX_UNCONFIRMED:
            self._confirm()
        if self.record_past and self._undo is None:
            self._undo = self._snapshot()
        handles = super().update(key_states, value_states, *args, **kwargs)
        self._attended = False
        return handles

    def activate_past_recording(self) -> None:
        if self.options.deferred:
            raise ValueError(
                f"layer {self.index} evicts and other layers read its keys: drafts (assisted, prompt-lookup decoding) "
                "would be evicted before these have read them; accepted here: decoding without drafts, or a cache that "
                "does not evict"
            )
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)
        if self.storage is None:
            return
        self.flush()
        undo, self._undo = self._undo, None
        keep = self._seen + tokens_to_remove
        if tokens_to_remove and undo is not None:
            self._redo(undo, max(keep - undo.seen, 0))
        if keep < self._seen:
            self._truncate(keep)
        self.padding = self.padding.before(keep)
        self._confirm()
        self.version += 1

    def check_crop(self, tokens_to_remove: int) -> None:
        super().check_crop(tokens_to_remove)
        undo, evictor = self._undo, self.evictor
        if undo is not None:
            evictor = undo.evictor
        length = self._seen + tokens_to_remove
        redone = undo is not None and length >= undo.seen
        if tokens_to_remove and length > 0 and not redone and evictor is not None and length < evictor.evicted_at:
            raise RuntimeError(
                f"crop({tokens_to_remove!r}): layer {self.index} evicted tokens after it had seen "
                f"{evictor.evicted_at}, which a cache of {length} tokens would hold. fork() the cache before it grows, "
                "or call activate_past_recording() before the tokens are added."
            )

    def reset(self) -> None:
        super().reset()
        self.evictor = self._undo = None
        self._attended = True

    # -- what the package adds ------------------------------------------------------------------------------------

    def select_rows(self, rows: np.ndarray) -> None:
        same = len(rows) == self.batch_size and bool((rows == np.arange(len(rows))).all())
        super().select_rows(rows)
        if self.evictor is not None and not same:
            self._undo = None
            self.evictor = self.evictor.select(rows)

    def fork(self) -> EvictingLayer:
        other = super().fork()
        assert isinstance(other, EvictingLayer)
        other._undo = other.watcher = None
        if self.evictor is not None:
            other.evictor = self.evictor.select(np.arange(self.batch_size))
        return other

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"watcher": None}

    def attend(
        self,
        query: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scoring: Scoring,
        causal: bool = True,
        module: torch.nn.Module | None = None,
    ) -> torch.Tensor:
        new, _ = self._latest()
        skip = self.check_query(query)
        if self.options.deferred and self._attended:
            return self._attend_shared(new, skip, query, attention_mask, scoring, causal, module)
        if query.shape[2] != new.length:
            raise ValueError(
                f"{query.shape[2]} queries for {new.length} new tokens; accepted with eviction: one a token"
            )
        assert self.evictor is not None
        self.evictor.attending = Attending(scoring, module)
        self._note_padding(new, attention_mask)
        draft = Draft(new, query, attention_mask, scoring, causal, first=False)
        if self._undo is not None:
            self._undo.drafts.append(draft)
        output = self._attend(draft)
        self._attended = True
        if not self.options.deferred:
            self.flush()
        return output

    def note_attended(
        self,
        attention_mask: torch.Tensor | None,
        query: torch.Tensor | int,
        scoring: Scoring | None = None,
        module: torch.nn.Module | None = None,
    ) -> None:
        new, _ = self._latest()
        assert self.evictor is not None
        if self.options.deferred and self._attended:
            return  # a layer that shares these keys, whose queries do not count
        self._note_padding(new, attention_mask)
        if isinstance(query, torch.Tensor):
            scoring = Scoring(query.shape[-1] ** -0.5) if scoring is None else scoring
            self.evictor.attending = Attending(scoring, module)
            draft = Draft(new, query, attention_mask, scoring, causal=True, first=True)
            if self._undo is not None:
                self._undo.drafts.append(draft)
            self._observe_first(draft)
        elif self.evictor.stateful or self._undo is not None:
            raise self._not_attended()
        else:
            self.evictor.note(new.position, new.length, new.valid)
        self._attended = True
        if not self.options.deferred:
            self.flush()

    def flush(self) -> None:
        new, storage, evictor = self._new, self.storage, self.evictor
        if new is None or storage is None or evictor is None:
            return
        if not self._attended:
            raise self._not_attended()
        self._new = None
        try:
            if not new.stored:
                self._store(new)
            if self._undo is None:
                self._flush_block()
        except BaseException:
            self.note_broken()
            raise

    @property
    def complete_length(self) -> int:
        return self._seen if self._attended or self._new is None else self._new.position

    def check_take_back(self, length: int) -> None:
        undone = self._undo is not None and length >= self._undo.seen
        if self.evictor is not None and not undone and length < self.evictor.evicted_at:
            raise RuntimeError(CANNOT_TAKE_BACK.format(self.index, "the tokens that were evicted meanwhile"))

    def take_back(self, length: int) -> None:
        new, self._new = self._new, None
        attended, self._attended = self._attended, True
        undo, self._undo = self._undo, None
        if undo is not None:
            self._redo(undo, max(length - undo.seen, 0))
        storage, evictor = self.storage, self.evictor
        if storage is not None and evictor is not None and (undo is None or length < undo.seen):
            storage.truncate_from(length)
            if not attended and new is not None:
                evictor.observations.block = None  # what else there is of queries, they were to be added to
            evictor.return_to(length, storage, observed=attended)
        self._seen = length
        self.padding = self.padding.before(length)
        self._confirm()
        self.version += 1

    def note_dense_read(self) -> None:
        if not self._attended:
            raise self._not_attended()

    def dense_side(self, side: str) -> torch.Tensor:
        new, evictor = self._new, self.evictor
        if new is not None and not new.stored and new.position == 0:
            return getattr(new, side)
        if evictor is None or evictor.evictions == 0:
            return super().dense_side(side)
        raise RuntimeError(_NOT_DENSE.format(self.index))

    def decompressed(self, side: str) -> torch.Tensor:
        if self.evictor is not None and self.evictor.evictions:
            raise RuntimeError(_NOT_DENSE.format(self.index))
        return super().decompressed(side)

    def own_tensors(self) -> list[torch.Tensor]:
        return [] if self.evictor is None else self.evictor.tensors()

    def tensors(self) -> dict[str, torch.Tensor]:
        state = super().tensors()
        if self.evictor is not None:
            state |= {f"evictor.{name}": tensor for name, tensor in self.evictor.state().items()}
        return state

    def restore(
        self, tensors: dict[str, torch.Tensor], progress: dict[str, int], device: torch.device | str | None = None
    ) -> None:
        super().restore(tensors, progress, device)
        if self.evictor is not None:
            prefix = "evictor."
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            self.evictor.restore(own, self.device)

    def compress(self) -> None:
        """Evict now down to the budget."""
        self.flush()
        if self.storage is not None and self.evictor is not None:
            self.evictor.evict(self.storage, np.arange(self.storage.batch), self._seen)
            self._compressed()

    def keep_only(self, keep: list[torch.Tensor]) -> None:
        """Drop every token that ``keep``, bool ``[1, Hkv, T]`` for each sequence, does not name, of those held."""
        self.flush()
        if self.storage is not None and self.evictor is not None:
            self.evictor.keep_only(self.storage, keep, self._seen)
            self._compressed()

    def _compressed(self) -> None:
        self._undo, self._unconfirmed = None, 0
        self.version += 1

    def kept_positions(self) -> torch.Tensor:
        """Original positions of the tokens held, int64 ``[B, Hkv, T]``, ``-1`` behind a head's last."""
        self.flush()
        if self.storage is None:
            return torch.zeros(0, 0, 0, dtype=torch.int64)
        held = [TokenView.of(self.storage, np.array([row])) for row in range(self.storage.batch)]
        out = torch.full((self.storage.batch, self.storage.heads, max(h.tokens for h in held)), -1)
        for row, one in enumerate(held):
            out[row, :, : one.tokens] = torch.from_numpy(np.where(one.exists, one.positions, -1)[0])
        return out

    # -- internals ------------------------------------------------------------------------------------------------

    def _attend(self, draft: Draft) -> torch.Tensor:
        """Attention of an update; in parts, each followed by the eviction it makes due, if it may be rolled back."""
        new = draft.new
        if self._undo is None:
            return self._attend_part(draft)
        outputs, start = [], 0
        while start < new.length:
            assert self.storage is not None and self.evictor is not None
            stop = min(new.length, start + self.evictor.room(self.storage))
            part = draft.part(slice(start, stop))
            outputs.append(self._attend_part(part))
            if not part.new.stored:
                self._store(part.new)
            self.evictor.flush_due(self.storage, part.new.position + part.new.length)
            start = stop
        new.stored = True
        return torch.cat(outputs, 1)

    def _attend_shared(
        self,
        new: NewTokens,
        skip: int,
        query: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scoring: Scoring,
        causal: bool,
        module: torch.nn.Module | None,
    ) -> torch.Tensor:
        """Attention of a layer that reads these keys too, over the same tokens: they are evicted once all have read."""
        storage = self.storage
        assert storage is not None
        visibility = self._visibility(new, storage, attention_mask, causal, skip)
        dense = dense_tokens(storage, new, visibility, 0, slice(skip, new.length))
        return self.read(query, storage.pages(), dense, visibility, scoring, module).output

    def _attend_part(self, draft: Draft) -> torch.Tensor:
        new, storage, evictor = draft.new, self.storage, self.evictor
        assert storage is not None and evictor is not None
        drafted, accumulated = self._undo is not None, evictor.policy.needs_accumulated
        evictor.note(new.position, new.length, new.valid, drafted)
        output = None
        if not accumulated and self.watcher is None:
            output = self.attend_token(new, storage, draft.query, draft.mask, draft.scoring)
        if output is None:
            result = self._read_all(draft, accumulated)
            output = result.output
            if self.watcher is not None:
                self.watcher(draft, result.log_sum_exp)
        evictor.observe_queries(self._as_attended(draft.query), new.position, new.valid, drafted)
        if accumulated:
            evictor.observe_sums(storage, result, 0 if new.stored else new.length, new.valid)
        return output

    def _read_all(self, draft: Draft, accumulated: bool) -> Attention:
        """Attention of an update over everything stored, after the update if it is one token."""
        new, storage, evictor = draft.new, self.storage, self.evictor
        assert storage is not None and evictor is not None
        visibility = self._visibility(new, storage, draft.mask, draft.causal, 0)
        if new.length == 1:
            self._store(new)
        dense = dense_tokens(storage, new, visibility, 0, slice(0, new.length))
        module = None if evictor.attending is None else evictor.attending.module
        return self.read(draft.query, storage.pages(), dense, visibility, draft.scoring, module, accumulated)

    def _observe_first(self, draft: Draft) -> None:
        new, storage, evictor = draft.new, self.storage, self.evictor
        assert storage is not None and evictor is not None
        evictor.note(new.position, new.length, new.valid)
        query = self._as_attended(draft.query)
        evictor.observe_queries(query, new.position, new.valid)
        if evictor.policy.needs_accumulated:
            evictor.observe_first(storage, query, new.keys, new.values, new.valid)

    def _as_attended(self, query: torch.Tensor) -> torch.Tensor:
        """Queries in the space of the keys that the evictor shows to a policy."""
        return query

    def _store(self, new: NewTokens) -> None:
        assert self.storage is not None
        if new.length == 1:
            self.storage.append_one(new.keys, new.values, new.position, None if new.valid is None else new.valid[:, 0])
        else:
            self.storage.append_block(new.keys, new.values, new.position, new.valid, pack=False)
        new.stored = True

    def _flush_block(self) -> None:
        """Evict what the latest update made due, now that nothing of it will be rolled back."""
        if self.storage is not None and self.evictor is not None:
            self.evictor.flush_update(self.storage, self._seen)

    def _flush_prefill(self, new: int) -> None:
        """Evict a prompt of several updates once the first token after it comes, or the first draft."""
        storage, evictor = self.storage, self.evictor
        follows = new == 1 or (self.record_past and self._undo is None)
        if follows and evictor is not None and evictor.schedule.ends_prompt:
            self.flush()
            if self._undo is None and storage is not None:
                evictor.evict(storage, np.arange(storage.batch), self._seen)

    def _confirm(self) -> None:
        """Take all tokens as confirmed."""
        self.flush()
        self._undo, self._unconfirmed = None, 0
        self._flush_block()

    def _snapshot(self) -> Undo:
        self.flush()
        evictor = None if self.evictor is None else self.evictor.select(np.arange(self.batch_size))
        return Undo(None if self.storage is None else self.storage.fork(), evictor, self._seen, [])

    def _redo(self, undo: Undo, tokens: int) -> None:
        """Return to what was before the drafts, and do the first ``tokens`` tokens of them again."""
        assert self.evictor is not None
        attending = self.evictor.attending
        if undo.storage is None:
            keys, values = undo.drafts[0].new.keys, undo.drafts[0].new.values
            self.lazy_initialization(keys, values)
        else:
            self.storage, self.evictor = undo.storage, undo.evictor
        assert self.evictor is not None
        self.evictor.attending, self._seen = attending, undo.seen
        self._undo = undo  # so that it is done again in the same parts
        for draft in undo.drafts:
            if tokens <= 0:
                break
            again = draft.part(slice(0, min(tokens, draft.new.length)))
            if draft.first:
                self._observe_first(again)
                self._store(again.new)
            else:
                self._attend(again)
            self._seen += again.new.length
            tokens -= again.new.length
        self._undo = None

    def _not_attended(self) -> RuntimeError:
        """What to raise where keys and values are used by anything but the attention function of this package."""
        config = self.options.config
        before = f"layer {self.index}: an evicting cache needs the queries of every update, "
        if config is not None and not is_bound(config):
            return RuntimeError(
                f"{before}which the attention implementation {config._attn_implementation!r} does not give. Call "
                "hf_kvcache.bind(model.config), or model.set_attn_implementation('hf_kvcache')"
            )
        known = None if config is None else architecture(config)
        name = "the model" if known is None else f"{known.model.__name__} of transformers {RELEASE}"
        return RuntimeError(
            f"{before}and {name} does not pass its keys and values on to attention as it got them (or update() was "
            "called without a model); accepted for such models: caches that keep every token, such as "
            "QuantizedKVCache(config, bits=4) or KVCache(config). If a forward pass was cut off here, call crop(0) to "
            "take it back"
        )

    def _truncate(self, length: int) -> None:
        storage, evictor = self.storage, self.evictor
        assert storage is not None and evictor is not None
        before = storage.tokens()
        storage.truncate_from(length)
        removed = before - storage.tokens()
        evictor.forget(removed, storage.dense.lengths, length)
        self._seen = length


_NOT_DENSE = (
    "layer {} has evicted tokens, other ones in each head: its keys and values are no dense tensor. "
    "Call model.set_attn_implementation('hf_kvcache'), or build the cache after another one was set."
)
#: Why an evicting cache is refused for some models, behind the name of the class that attends.
ATTENDS_OUTSIDE = (
    "attends by itself, not by the attention function that is set, and an evicting cache needs the queries; accepted: "
    "caches that keep every token, such as QuantizedKVCache(config, bits=4) or KVCache(config)"
)


def _rows_of(mask: torch.Tensor | None, queries: slice, length: int) -> torch.Tensor | None:
    """The part of a mask that is about some of ``length`` queries; the mask itself if it is about all of them."""
    if mask is None or queries == slice(0, length):
        return mask
    # No columns of later tokens: the last ones are taken to be those of the new tokens.
    mask = mask[..., : mask.shape[-1] - length + queries.stop]
    return mask[:, :, queries] if mask.dim() == 4 and mask.shape[2] == length else mask
