"""The common part of the prepared calls of the C++ kernels."""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch

from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.cpu.calls import set_pages
from hf_kvcache.kernels.inputs import CallInputs, DenseTokens, Pages, Slots, UpProjections
from hf_kvcache.kernels.visibility import Visibility


class CpuPreparedCall:
    """A call whose C struct stays filled in; each token sets only the fields that change.

    :class:`hf_kvcache.kernels.prepared_call.PreparedCall` describes the interface.
    """

    #: Sequences may hold different numbers of tokens: the kernels count the slots of each.
    takes_ragged = True
    #: Probabilities are not summed up.
    sums = None

    #: The part of the struct with the pages and the full-precision tokens; subclasses set it.
    _attend: Any

    def __init__(self, inputs: CallInputs) -> None:
        self.pages, self.slots, self._window = inputs.pages, inputs.slots, inputs.window
        self._stored: Any = None  # what the addresses of the pages in the struct refer to
        # A weak reference: these are views of the model's weight, and a prepared call may outlive the model.
        self._up = None if inputs.up is None else ref(inputs.up)

    @property
    def up(self) -> UpProjections | None:
        """The up-projections; None if there are none, or if the model is gone."""
        return None if self._up is None else self._up()

    def refit(self, pages: Pages | None, slots: Slots) -> bool:
        """See :meth:`hf_kvcache.kernels.prepared_call.PreparedCall.refit`."""
        before, sides = self.slots, (slots.keys, slots.values)
        layouts = [None if each is None else each.layout for each in (pages, self.pages)]
        if layouts[0] is not layouts[1] or any(x.dtype != before.keys.dtype or x.stride(-1) != 1 for x in sides):
            return False
        if pages is not None:
            self._stored = set_pages(self._attend, pages)
        self._set_dense(all_slots(slots, self._window))
        set_slots(self._attend.token, slots)
        self.pages, self.slots = pages, slots
        return True

    def _set_dense(self, dense: DenseTokens) -> None:
        """Fill in the full-precision slots."""
        raise NotImplementedError


def can_prepare(inputs: CallInputs) -> bool:
    """Whether a call can be prepared for tokens of such a layout and scoring."""
    keys, values, sinks = inputs.keys, inputs.values, inputs.scoring.sink_logits
    # Other sink logits would be converted, and the copy would not follow when they change.
    plain = sinks is None or (sinks.dtype == torch.float32 and sinks.is_contiguous())
    return plain and keys.stride(-1) == 1 and (values.stride(-1) == 1 or values.shape[-1] == 0)


def all_slots(slots: Slots, window: int | None) -> DenseTokens:
    """All slots, with their positions if there is a window."""
    positions = None if window is None else torch.from_numpy(slots.positions)
    return DenseTokens(slots.keys, slots.values, positions)


def visibility_of(inputs: CallInputs) -> Visibility:
    """What the queries see. Each call sets their position in the C struct."""
    return Visibility(0, inputs.query.shape[2], None, 0, True, inputs.window)


def set_token(token: library.Token, inputs: CallInputs) -> None:
    """Fill in number and strides of new tokens, and where they go."""
    token.count, token.ragged = inputs.keys.shape[2], inputs.ragged
    token.first_batch, token.first_head, token.first_token, _ = inputs.keys.stride()
    token.second_batch, token.second_head, token.second_token, _ = inputs.values.stride()
    set_slots(token, inputs.slots)


def set_slots(token: library.Token, slots: Slots) -> None:
    """Fill in where the positions of new tokens and the number of slots in use are noted."""
    token.positions, token.lengths = slots.positions.ctypes.data, slots.lengths.ctypes.data
    token.positions_batch = slots.positions.strides[0] // slots.positions.itemsize
