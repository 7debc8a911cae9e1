"""What steps of the C++ kernels have in common."""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch

from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.inputs import CallInputs, DenseTokens, Scoring, Slots, UpProjections
from hf_kvcache.kernels.visibility import Visibility


class NativeCall:
    """A call that stays filled in: only what changes from token to token is set.

    :class:`hf_kvcache.kernels.prepared_call.PreparedCall` says what it takes and gives.
    """

    def __init__(self, inputs: CallInputs) -> None:
        self.pages, self.slots = inputs.pages, inputs.slots
        # Views of the model's weight, which whoever makes the call holds: a step is kept longer than that.
        self._up = None if inputs.up is None else ref(inputs.up)
        self._scoring, self._kind = inputs.scoring, _kind(inputs.query, inputs.keys, inputs.values)

    @property
    def up(self) -> UpProjections | None:
        """The up-projections; None without any, or if they are gone."""
        return None if self._up is None else self._up()

    def fits(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring) -> bool:
        """Whether a token lies in memory, and is to be scored, like the one it was made for."""
        own = self._scoring
        return (
            own.sink_logits is scoring.sink_logits
            and own.scaling == scoring.scaling
            and own.softcap == scoring.softcap
            and self._kind == _kind(query, keys, values)
        )


def can_keep(inputs: CallInputs) -> bool:
    """Whether a call for such tokens can be kept."""
    keys, values, sinks = inputs.keys, inputs.values, inputs.scoring.sink_logits
    # Other sink logits are converted, and what was converted would not follow when they change.
    plain = sinks is None or (sinks.dtype == torch.float32 and sinks.is_contiguous())
    return plain and keys.stride(-1) == 1 and (values.stride(-1) == 1 or values.shape[-1] == 0)


def all_slots(inputs: CallInputs) -> DenseTokens:
    """All slots, with their positions where a window asks for them."""
    slots = inputs.slots
    positions = None if inputs.window is None else torch.from_numpy(slots.positions)
    return DenseTokens(slots.keys, slots.values, positions)


def sight(inputs: CallInputs) -> Visibility:
    """What the query sees; its position is set from token to token."""
    return Visibility(0, 1, None, 0, True, inputs.window)


def set_token(token: library.Token, keys: torch.Tensor, values: torch.Tensor, slots: Slots) -> None:
    """Fill in how a new token lies in memory, and where it is noted."""
    token.first_batch, token.first_head, _, _ = keys.stride()
    token.second_batch, token.second_head, _, _ = values.stride()
    token.positions, token.lengths = slots.positions.ctypes.data, slots.lengths.ctypes.data
    token.positions_batch = slots.positions.strides[0] // slots.positions.itemsize


def _kind(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[Any, ...]:
    return query.shape, query.stride(), query.dtype, keys.stride(), values.stride()
