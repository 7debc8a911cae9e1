"""The common part of the prepared calls of the C++ kernels."""

from __future__ import annotations

from weakref import ref

import torch

from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.inputs import CallInputs, DenseTokens, Slots, UpProjections
from hf_kvcache.kernels.visibility import Visibility


class CpuPreparedCall:
    """A call whose C struct stays filled in; each token sets only the fields that change.

    :class:`hf_kvcache.kernels.prepared_call.PreparedCall` describes the interface.
    """

    def __init__(self, inputs: CallInputs) -> None:
        self.pages, self.slots = inputs.pages, inputs.slots
        # A weak reference: these are views of the model's weight, and a prepared call may outlive the model.
        self._up = None if inputs.up is None else ref(inputs.up)

    @property
    def up(self) -> UpProjections | None:
        """The up-projections; None if there are none, or if the model is gone."""
        return None if self._up is None else self._up()


def can_prepare(inputs: CallInputs) -> bool:
    """Whether a call can be prepared for tokens of such a layout and scoring."""
    keys, values, sinks = inputs.keys, inputs.values, inputs.scoring.sink_logits
    # Other sink logits would be converted, and the copy would not follow when they change.
    plain = sinks is None or (sinks.dtype == torch.float32 and sinks.is_contiguous())
    return plain and keys.stride(-1) == 1 and (values.stride(-1) == 1 or values.shape[-1] == 0)


def all_slots(inputs: CallInputs) -> DenseTokens:
    """All slots, with their positions if there is a window."""
    slots = inputs.slots
    positions = None if inputs.window is None else torch.from_numpy(slots.positions)
    return DenseTokens(slots.keys, slots.values, positions)


def visibility_of(inputs: CallInputs) -> Visibility:
    """What the query sees. Each token sets its position in the C struct."""
    return Visibility(0, 1, None, 0, True, inputs.window)


def set_token(token: library.Token, keys: torch.Tensor, values: torch.Tensor, slots: Slots) -> None:
    """Fill in the strides of a new token, and where its position and the number of slots in use are noted."""
    token.first_batch, token.first_head, _, _ = keys.stride()
    token.second_batch, token.second_head, _, _ = values.stride()
    token.positions, token.lengths = slots.positions.ctypes.data, slots.lengths.ctypes.data
    token.positions_batch = slots.positions.strides[0] // slots.positions.itemsize
