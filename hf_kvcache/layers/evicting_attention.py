"""Attention of a layer that evicts: the eviction policy observes it, and chooses by it which tokens stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from weakref import WeakMethod

import torch

from hf_kvcache.eviction.options import Attending, EvictionOptions, LayerPlace
from hf_kvcache.integration.architecture import architecture
from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.integration.binding import is_bound
from hf_kvcache.integration.versions import RELEASE
from hf_kvcache.kernels.inputs import Attention
from hf_kvcache.kernels.prepared_call import takes_sums
from hf_kvcache.layers.drafts import Draft, Undo
from hf_kvcache.layers.gate_scores import GateScores
from hf_kvcache.layers.new_tokens import NewTokens, dense_tokens
from hf_kvcache.layers.options import LayerOptions
from hf_kvcache.storage import PagedStorage
from hf_kvcache.utils.autocast import without_autocast


class EvictingAttention(GateScores):
    """A layer whose attention is observed by an :class:`Evictor`, which drops tokens after attention has read them.

    The arguments are those of :class:`GateScores`.
    """

    evicts = True
    #: Whether prepared calls can also sum up the attention that keys receive.
    prepares_sums = True
    prepares_blocks = False  # a draft is computed in parts, and between them tokens are evicted

    def __init__(self, index: int, options: LayerOptions, eviction: EvictionOptions, place: LayerPlace) -> None:
        super().__init__(index, options, eviction, place)
        #: Called after every attention over stored tokens, with the update and the log-sum-exp ``[B, Hq, q]``; None for
        #: no call. The replay of KVzip sets it.
        self.watcher: Callable[[Draft, torch.Tensor], None] | None = None
        #: A weak reference to a function that evicts tokens of all layers of the cache together; None if each layer
        #: chooses alone. A cache whose heads compete across layers sets it.
        self.together: WeakMethod[Callable[[], None]] | None = None

    def clear(self) -> None:
        super().clear()
        self._undo: Undo | None = None
        self._attended = True

    def attend(self, call: AttentionCall) -> torch.Tensor:
        new, storage = self._latest()
        skip = self.check_query(call.queries)
        if self.options.deferred and self._attended:
            return self._attend_shared(new, storage, call, skip)
        if skip:
            raise ValueError(
                f"query has {call.count} tokens, key_states {new.length}; accepted with eviction: equally many"
            )
        assert self.evictor is not None
        self.evictor.attending = Attending(call.scoring, call.module)
        self.note_padding(new, call.mask)
        self.balance(new, call)
        draft = self._draft(new, call, first=False)
        output = self._attend_draft(draft)
        self._attended = True
        if not self.options.deferred:
            self.flush()
        return output

    def note_attended(self, call: AttentionCall) -> None:
        new, _ = self._latest()
        assert self.evictor is not None
        if self.options.deferred and self._attended:
            return  # a layer that reads the keys of this one; its queries are not observed
        self.note_padding(new, call.mask)
        if call.query is not None:
            self.evictor.attending = Attending(call.scoring, call.module)
            self.balance(new, call)
            self._observe_first(self._draft(new, call, first=True))
        elif self.evictor.stateful or self._undo is not None:
            raise self.not_attended()
        else:
            self.evictor.note(new.position, new.length, new.valid)
            self._keep_scores(new)
        self._attended = True
        if not self.options.deferred:
            self.flush()

    def queries_for_policy(self, query: torch.Tensor) -> torch.Tensor:
        """The queries in the space of the keys that a policy sees; for latents this is the latent space."""
        return query

    def not_attended(self) -> RuntimeError:
        """The error for an update whose keys and values did not reach the attention function of this package."""
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
            f"{before}and {name} does not pass the result of update() on to the attention function (or update() was "
            "called without a model); accepted for such models: caches that keep every token, such as "
            "QuantizedKVCache(config, bits=4) or KVCache(config). If a forward pass was interrupted, call crop(0) to "
            "undo it"
        )

    def note_dense_read(self) -> None:
        if not self._attended:
            raise self.not_attended()

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

    # -- internals ------------------------------------------------------------------------------------------------

    def _draft(self, new: NewTokens, call: AttentionCall, first: bool) -> Draft:
        """The update as a draft. It is recorded for repetition if a ``crop`` may remove it."""
        if self._undo is None:
            return Draft(new, call, first)
        # The module is left out, because a cache must not keep a model alive.
        draft = Draft(new, replace(call, module=None), first)
        self._undo.drafts.append(draft)
        return draft

    def _attend_draft(self, draft: Draft) -> torch.Tensor:
        """Attention of an update.

        An update that a ``crop`` may remove is computed in parts. After each part the tokens are evicted that plain
        decoding would have evicted there.
        """
        new = draft.new
        if self._undo is None:
            return self._attend_part(draft)
        outputs, start = [], 0
        while start < new.length:
            storage, evictor = self._held()
            stop = min(new.length, start + evictor.schedule.room(storage))
            part = draft.part(slice(start, stop))
            outputs.append(self._attend_part(part))
            if not part.new.stored:
                self._store(part.new)
            evictor.flush_due(storage, part.new.position + part.new.length)
            start = stop
        new.stored = True
        return torch.cat(outputs, 1)

    def _attend_shared(self, new: NewTokens, storage: PagedStorage, call: AttentionCall, skip: int) -> torch.Tensor:
        """Attention of another layer that reads the keys of this one. Eviction waits until all layers have read."""
        visibility = self.visibility(new, call, skip)
        dense = dense_tokens(storage, new, visibility, 0, slice(skip, new.length))
        return self.read(call, call.queries, self.pages_of(storage, storage.ahead), dense, visibility).output

    def _attend_part(self, draft: Draft) -> torch.Tensor:
        new, (storage, evictor) = draft.new, self._held()
        drafted, accumulated = self._undo is not None, evictor.policy.needs_accumulated
        evictor.note(new.position, new.length, new.valid, drafted)
        output = None
        if self.watcher is None and (not accumulated or self._steps_with_sums(draft.call)):
            output = self.attend_tokens(new, storage, draft.call)
            accumulated = accumulated and output is None
        if output is None:
            result = self._read_all(draft, accumulated)
            output = result.output
            if self.watcher is not None:
                with without_autocast(storage.device):
                    self.watcher(draft, result.log_sum_exp)
        observations = evictor.observations
        observations.see(self.queries_for_policy(draft.call.queries), new.position, new.valid, drafted)
        if accumulated:
            observations.add_attention(storage, result, 0 if new.stored else new.length, new.valid)
        if new.scores is not None:  # asked here, since every decoding step comes by
            self._keep_scores(new)
        return output

    def _steps_with_sums(self, call: AttentionCall) -> bool:
        """Whether a prepared call can also sum up the attention that keys receive."""
        return self.prepares_sums and call.count == 1 and takes_sums(self.takes_expansion, call.queries.device)

    def step(self, new: NewTokens, storage: PagedStorage, call: AttentionCall) -> torch.Tensor | None:
        assert self.evictor is not None
        if self.prepared is None or call.query is None or not self.evictor.policy.needs_accumulated:
            return super().step(new, storage, call)
        received = self.evictor.observations.received(storage)
        return self.prepared.attend(storage, new, call.query, call.scoring, received=received)

    def _read_all(self, draft: Draft, accumulated: bool) -> Attention:
        """Attention of an update over all tokens. A single new token is stored first; several are stored afterwards."""
        new, call, (storage, _) = draft.new, draft.call, self._held()
        visibility = self.visibility(new, call, 0)
        if new.length == 1:
            self._store(new)
        dense = dense_tokens(storage, new, visibility, 0, slice(0, new.length))
        return self.read(call, call.queries, self.pages_of(storage, storage.ahead), dense, visibility, accumulated)

    def _observe_first(self, draft: Draft) -> None:
        """Let the evictor observe a first update, whose attention the model's own implementation has computed."""
        new, (storage, evictor) = draft.new, self._held()
        evictor.note(new.position, new.length, new.valid)
        query = self.queries_for_policy(draft.call.queries)
        evictor.observations.see(query, new.position, new.valid, drafted=False)
        if evictor.policy.needs_accumulated:
            evictor.observe_first(storage, query, new.keys, new.values, new.valid)
        self._keep_scores(new)

    def _store(self, new: NewTokens) -> None:
        storage, _ = self._held()
        if new.length == 1:
            new.append_one_to(storage)
        else:
            storage.append_block(new.keys, new.values, new.position, new.valid, pack=False)
        new.stored = True

    def _flush_block(self) -> None:
        """Evict tokens if the latest update made an eviction due. None of its tokens will be removed by a ``crop``."""
        if self.storage is not None and self.evictor is not None:
            self.evictor.flush_update(self.storage, self._seen)


_NOT_DENSE = (
    "layer {} has evicted tokens, different ones in each head, so its keys and values are no dense tensor. "
    "Call model.set_attn_implementation('hf_kvcache'), or set the attention implementation before the cache is built."
)
