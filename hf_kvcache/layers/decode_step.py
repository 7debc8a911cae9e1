"""Decoding by prepared calls: plain steps of one token, and a few tokens at once, such as drafts.

A prepared call is a kernel call whose arguments are checked once and used for many tokens. The Python code of a decode
step delays the kernel, so it is one function here, and reads attributes in place of calling methods.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_kvcache.eviction.accumulated import AccumulatedAttention
from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.integration.padding import padding_of
from hf_kvcache.kernels.inputs import CallInputs, Pages, Scoring, Slots, UpProjections
from hf_kvcache.kernels.padding import NO_PADDING
from hf_kvcache.kernels.prepared_call import PreparedCall, most_tokens, prepare
from hf_kvcache.layers.attention import AttentionOverPages
from hf_kvcache.layers.new_tokens import NewTokens
from hf_kvcache.storage import PagedStorage


class PreparedDecoding:
    """Attention of single tokens, or a few, over the storage of one layer, by prepared calls.

    Args:
        window: number of tokens that a query sees, its own included; None for full attention.
    """

    def __init__(self, window: int | None) -> None:
        self.window = window
        self._latest: PreparedCall | None = None
        # What the latest call was prepared for: the page table, the layout of the tokens, the scoring.
        self._version = -1
        self._kind: tuple[Any, ...] = ()
        self._scoring: Scoring | None = None

    def attend(
        self,
        storage: PagedStorage,
        new: NewTokens,
        query: torch.Tensor,
        scoring: Scoring,
        up: UpProjections | None = None,
        pages: Pages | None = None,
        received: AccumulatedAttention | None = None,
    ) -> torch.Tensor | None:
        """Store new tokens of each sequence, and compute their attention over themselves and all tokens before them.

        Args:
            storage: holds no page packed ahead, and equally many tokens of each sequence unless ragged ones are taken.
            new: n tokens of each sequence, none of them padding; no more than the backend takes.
            query: ``[B, Hq, n, Dk]``.
            scoring: how scores are computed.
            up: the weights that expand latents to keys and values; None if the storage holds keys and values.
            pages: the pages to read, the same object from step to step; None for all pages of the storage.
            received: where the probabilities of keys are added; None if nobody wants them.

        Returns:
            ``[B, n, Hq, Dv]``. None, with nothing stored, if no kernel can store and attend in one call.
        """
        dense, call, known, keys, values = storage.dense, self._latest, self._scoring, new.keys, new.values
        slot, ragged = dense.longest, dense.uniform_length is None
        used = slot + keys.shape[2]
        kind = (query.shape, query.stride(), query.dtype, keys.stride(), values.stride(), ragged)
        # Pages outside of the device are fetched for every token and may move; who gives `pages` has fetched them.
        fetched = storage.pages() if pages is None and storage.reader.fetch is not None else None
        if used > dense.positions.shape[1]:
            dense.reserve(used)
        if (
            call is None
            or known is None
            or self._kind != kind
            or known.sink_logits is not scoring.sink_logits
            or known.scaling != scoring.scaling
            or known.softcap != scoring.softcap
            or (up is not None and call.up is not up)
        ):
            call = None  # of another kind
        if (
            call is None
            or self._version != storage.table.version
            or (fetched is not None and call.pages is not fetched)
            or call.slots.keys is not dense.keys  # replaced together with the values and positions
            or call.slots.lengths is not dense.lengths  # replaced whenever tokens leave the buffer or are taken back
            or (pages is not None and call.pages is not pages)
            or (received is not None and not received.holds(call.sums))
        ):
            call = self._renew(call, kind, storage, (query, keys, values), scoring, up, pages, received)
            if call is None:
                return None
        output = call(query, keys, values, slot, new.position)
        dense.longest = used  # the call has counted them in `lengths`
        if not ragged:
            dense.uniform_length = used
        new.stored = True
        return output

    def _renew(
        self,
        call: PreparedCall | None,
        kind: tuple[Any, ...],
        storage: PagedStorage,
        new: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        scoring: Scoring,
        up: UpProjections | None,
        pages: Pages | None,
        received: AccumulatedAttention | None,
    ) -> PreparedCall | None:
        """The call with the pages and slots of the storage, or a new one; None if no kernel can.

        Args:
            call: the latest call; None if it was made for another kind of tokens.
            kind: of the tokens.
            storage: as in :meth:`attend`, like all that follows.
            new: query, keys and values of the new tokens.
        """
        self._latest = None  # what follows may be interrupted: only then is there a call for all of these
        dense, read = storage.dense, storage.pages() if pages is None else pages
        slots = Slots(dense.keys, dense.values, dense.positions, dense.lengths, dense.positions_on_device)
        sums = None if received is None else received.room_for(slots, read)  # may replace those of the latest call
        if call is not None and (call.sums is None if received is None else received.holds(call.sums)):
            call = call if call.refit(read, slots) else None
        else:
            call = None
        if call is None:
            ragged = dense.uniform_length is None
            call = prepare(CallInputs(*new, read, slots, scoring, self.window, up, ragged, sums))
        self._version, self._kind, self._scoring, self._latest = storage.table.version, kind, scoring, call
        return call


class DecodeSteps(AttentionOverPages):
    """A layer that uses prepared calls for decoding, and general attention over pages for everything else."""

    #: Whether prepared calls can serve the layer: the kernels read its pages without further work in Python.
    can_prepare = True
    #: Whether they can serve several tokens at once, and tokens that may be rolled back.
    prepares_blocks = True

    def clear(self) -> None:
        super().clear()
        #: The prepared calls; None for a layer that cannot use them.
        self.prepared = PreparedDecoding(self.sliding_window) if self.can_prepare else None

    def attend(self, call: AttentionCall) -> torch.Tensor:
        new, storage = self._new, self.storage
        output = None if new is None or storage is None else self.attend_tokens(new, storage, call)
        if output is None or storage is None:
            return super().attend(call)
        if not self.options.deferred:
            recording, full = self.rollback.recording, storage.dense.longest >= storage.writer.first_due
            if self.sliding_window is None and not recording and not full:
                self._new = None  # the tokens are stored, and no page is full
            else:
                self.flush()
        return output

    def attend_tokens(self, new: NewTokens, storage: PagedStorage, call: AttentionCall) -> torch.Tensor | None:
        """Store the new tokens and compute their attention by a prepared call.

        Returns:
            ``[B, n, Hq, Dv]``. None, with nothing stored, if no prepared call can serve the update: it has many tokens
            or new padding, a padded or ragged batch that the backend does not take, a mask that hides more than
            causality and padding do, drafts that reach a new page, or a gradient.
        """
        query, keys = call.query, new.keys
        if (
            query is None
            or self.prepared is None
            or query.shape[2] != keys.shape[2]
            or new.stored
            or storage.writer.ahead  # whose tokens leave the buffer without a change of the table
            or query.shape[0] != keys.shape[0]
            or query.shape[1] % storage.heads
            or (query.requires_grad and torch.is_grad_enabled())
        ):
            return None
        count = keys.shape[2]
        if (count > 1 or self.rollback.recording) and not self._takes_block(storage, call, count):
            return None
        if self.padding is not NO_PADDING or storage.dense.uniform_length is None:
            # Where the padding of this update is noted already, `self.padding` has it too.
            earlier = self.padding if new.earlier_padding is None else new.earlier_padding
            padding = padding_of(call.mask, new.position, count, self.sliding_window)
            if padding is None or not padding.hides_only(earlier) or padding.valid is not None:
                return None
        elif call.mask is not None:
            padding = padding_of(call.mask, new.position, count, self.sliding_window)
            if padding is None or not padding.none:
                return None
        return self.step(new, storage, call)

    def _takes_block(self, storage: PagedStorage, call: AttentionCall, count: int) -> bool:
        """Whether a prepared call can serve ``count`` tokens at once, or such that may be rolled back."""
        if not self.prepares_blocks or count > most_tokens(self.takes_expansion, call.queries.device):
            return False
        if count > 1 and not call.causal and (call.mask is None or call.mask.dim() != 4):
            return False  # a 4D mask without anything but padding is causal, whatever the module says
        # Drafts see a page as packed from the token on at which plain decoding packs it.
        return not self.rollback.recording or storage.dense.longest + count <= storage.writer.first_due

    def step(self, new: NewTokens, storage: PagedStorage, call: AttentionCall) -> torch.Tensor | None:
        """The prepared call of :meth:`attend_tokens`, which has checked the update. None if no kernel supports it."""
        query = call.query
        if self.prepared is None or query is None:
            return None
        return self.prepared.attend(storage, new, query, call.scoring)

    def _copy(self) -> Any:
        other = super()._copy()
        other.prepared = None if self.prepared is None else PreparedDecoding(self.sliding_window)
        return other

    def __getstate__(self) -> dict[str, Any]:
        # A prepared call holds memory addresses, which mean nothing in another process.
        return self.flushed().__dict__ | {"prepared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.prepared = PreparedDecoding(self.sliding_window) if self.can_prepare else None
