"""Plain decoding, one token after the other: what stays the same from step to step is prepared once."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.inputs import CallInputs, Scoring, Slots, UpProjections
from hf_kvcache.kernels.prepared_call import PreparedCall, prepare
from hf_kvcache.layers.new_tokens import NewTokens
from hf_kvcache.storage import PagedStorage


class PreparedDecoding:
    """Attention of single tokens over one layer's storage.

    Args:
        window: tokens a query sees (sliding windows); None for all.
    """

    def __init__(self, window: int | None) -> None:
        self.window = window
        self._latest: PreparedCall | None = None

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
            storage: holds equally many tokens of each sequence, none ahead.
            new: a real token of each sequence.
            query: ``[B, Hq, 1, Dk]``.
            scoring: how scores are made.
            up: what turns latents into keys and values; None if the storage holds keys and values.

        Returns:
            ``[B, 1, Hq, Dv]``; None, with nothing stored, where no kernel does both at once.
        """
        slot = storage.dense.longest
        storage.dense.reserve(slot + 1)
        call = self._latest
        if call is None or not self._goes_on(call, storage, up) or not call.fits(query, new.keys, new.values, scoring):
            call = self._latest = self._prepare(storage, new, query, scoring, up)
            if call is None:
                return None
        output = call(query, new.keys, new.values, slot, new.position)
        storage.dense.note_one_stored()
        new.stored = True
        return output

    def _goes_on(self, call: PreparedCall, storage: PagedStorage, up: UpProjections | None) -> bool:
        """Whether all that the step holds the addresses of is still what the storage consists of."""
        slots, dense = call.slots, storage.dense
        return (
            call.pages is storage.pages()
            and slots.keys is dense.keys  # replaced with the values and positions
            and slots.lengths is dense.lengths
            and call.up is up
        )

    def _prepare(
        self, storage: PagedStorage, new: NewTokens, query: torch.Tensor, scoring: Scoring, up: UpProjections | None
    ) -> PreparedCall | None:
        dense = storage.dense
        slots = Slots(dense.keys, dense.values, dense.positions, dense.lengths)
        return prepare(CallInputs(query, new.keys, new.values, storage.pages(), slots, scoring, self.window, up))
