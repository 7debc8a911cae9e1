"""Plain decoding, one token after the other: what stays the same from token to token is prepared once.

A plain step is what a GPU or a kernel waits for, so that it is one function here, with no call that an attribute can
replace.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.integration.padding import padding_of
from hf_kvcache.kernels.inputs import CallInputs, Scoring, Slots, UpProjections
from hf_kvcache.kernels.padding import NO_PADDING
from hf_kvcache.kernels.prepared_call import PreparedCall, prepare
from hf_kvcache.layers.attention import AttentionOverPages
from hf_kvcache.layers.new_tokens import NewTokens
from hf_kvcache.storage import PagedStorage


class PreparedDecoding:
    """Attention of single tokens over one layer's storage, by calls that are prepared for many tokens.

    Args:
        window: tokens a query sees (sliding windows); None for all.
    """

    def __init__(self, window: int | None) -> None:
        self.window = window
        self._latest: PreparedCall | None = None
        self._version = -1  # of the page table that it was prepared for

    def attend(
        self,
        storage: PagedStorage,
        new: NewTokens,
        query: torch.Tensor,
        scoring: Scoring,
        up: UpProjections | None = None,
    ) -> torch.Tensor | None:
        """Store one token a sequence and attend to it and to all before it.

        Args:
            storage: holds equally many tokens of each sequence, none packed ahead.
            new: a token of each sequence, none of them padding.
            query: ``[B, Hq, 1, Dk]``.
            scoring: how scores are made.
            up: what turns latents into keys and values; None if the storage holds keys and values.

        Returns:
            ``[B, 1, Hq, Dv]``; None, with nothing stored, where no kernel does both at once.
        """
        dense, call, keys, values = storage.dense, self._latest, new.keys, new.values
        slot = dense.longest
        if slot == dense.positions.shape[1]:
            dense.reserve(slot + 1)
        if (
            call is None
            or self._version != storage.table.version
            or call.slots.keys is not dense.keys  # replaced together with the values and positions
            or call.slots.lengths is not dense.lengths
            or call.kind != (query.shape, query.stride(), query.dtype, keys.stride(), values.stride())
            or call.scoring.sink_logits is not scoring.sink_logits
            or call.scoring.scaling != scoring.scaling
            or call.scoring.softcap != scoring.softcap
            or (up is not None and call.up is not up)
        ):
            slots = Slots(dense.keys, dense.values, dense.positions, dense.lengths)
            inputs = CallInputs(query, keys, values, storage.pages(), slots, scoring, self.window, up)
            call, self._version = prepare(inputs), storage.table.version
            self._latest = call
            if call is None:
                return None
        output = call(query, keys, values, slot, new.position)
        dense.uniform_length = dense.longest = slot + 1  # the call has counted it in `lengths`
        new.stored = True
        return output


class DecodeSteps(AttentionOverPages):
    """A layer that does plain decoding by prepared calls, and everything else as attention over pages."""

    #: Whether attention is no more than reading pages, so that calls can be prepared.
    can_prepare = True

    def clear(self) -> None:
        super().clear()
        #: Prepared calls; None where each token is attended to in the general way.
        self.prepared = PreparedDecoding(self.sliding_window) if self.can_prepare else None

    def attend(self, call: AttentionCall) -> torch.Tensor:
        new, storage = self._new, self.storage
        output = None if new is None or storage is None else self.attend_token(new, storage, call)
        if output is None or storage is None:
            return super().attend(call)
        if not self.options.deferred:
            if self.sliding_window is None and storage.dense.longest < storage.writer.first_due:
                self._new = None  # it is stored, and nothing is due to be packed
            else:
                self.flush()
        return output

    def attend_token(self, new: NewTokens, storage: PagedStorage, call: AttentionCall) -> torch.Tensor | None:
        """Store the one new token and attend to it and to all held; None, and nothing stored, if it is more than that.

        More are several tokens, a padded or ragged batch, a mask that says more than causality, tokens that may be
        taken back, a gradient asked for.
        """
        query, keys = call.query, new.keys
        if (
            query is None
            or self.prepared is None
            or keys.shape[2] != 1
            or query.shape[2] != 1
            or new.stored
            or self.rollback.recording
            or storage.dense.uniform_length is None
            or self.padding is not NO_PADDING
            or query.shape[0] != keys.shape[0]
            or query.shape[1] % storage.heads
            or (query.requires_grad and torch.is_grad_enabled())
        ):
            return None
        if call.mask is not None:
            padding = padding_of(call.mask, new.position, 1, self.sliding_window)
            if padding is None or not padding.none:
                return None
        return self.step(new, storage, call)

    def step(self, new: NewTokens, storage: PagedStorage, call: AttentionCall) -> torch.Tensor | None:
        """:meth:`attend_token` once it is known to be no more; None where no kernel does it at once."""
        query = call.query
        if self.prepared is None or query is None:
            return None
        return self.prepared.attend(storage, new, query, call.scoring)

    def _copy(self) -> Any:
        other = super()._copy()
        other.prepared = None if self.prepared is None else PreparedDecoding(self.sliding_window)
        return other

    def __getstate__(self) -> dict[str, Any]:
        # A prepared call holds addresses.
        return self.flushed().__dict__ | {"prepared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.prepared = PreparedDecoding(self.sliding_window) if self.can_prepare else None
