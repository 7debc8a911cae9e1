"""Prepared calls of the CPU kernels against float64: blocks of tokens and ragged batches, on every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.cpu.decode import PreparedCall
from hf_kvcache.kernels.inputs import CallInputs, DenseTokens, Slots
from hf_kvcache.kernels.visibility import Visibility
from tests.choosing import pairwise
from tests.kernels.cpu import brute_force
from tests.kernels.cpu.cases import Call, Shape, make_call
from tests.kernels.cpu.comparing import tolerance_of
from tests.kernels.cpu.grid import make_case
from tests.tolerances import assert_within

#: Slots of the buffer: more than the kernels take at a time, so that a block may begin in one tile and end in the next.
SLOTS = 150
#: Slots that each sequence uses before the block: none, few, up to the end of a tile, and as many as there is room for.
USED = (0, 7, 122, SLOTS)
#: Options of a call, with new tokens of a sequence and query heads of a KV head.
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "token": (1, 3, {}),
    "two": (2, 1, {"softcap": 3.0, "biased": True}),
    "window": (5, 3, {"window": 9, "scattered": True}),
    "block": (16, 2, {"sinks": True, "strided": True, "biased": True}),
    "window of the block": (12, 1, {"window": 4}),
}


def in_slots(call: Call, length: int, ragged: bool) -> tuple[Call, np.ndarray]:
    """The call with new tokens in the last slots that each sequence uses, and how many it used before, ``[B]``."""
    batch, start = len(call.query), call.visibility.start + length
    used = np.minimum(USED, SLOTS - length) if ragged else np.full(batch, SLOTS - length)
    positions = torch.arange(start - SLOTS, start).repeat(batch, 1)
    for row, first in enumerate(used):
        positions[row, first : first + length] = torch.arange(start, start + length)
    unused = torch.from_numpy(np.arange(SLOTS) >= (used + length)[:, None])
    dense = DenseTokens(call.dense.keys, call.dense.values, positions, unused)
    see = Visibility(start, length, None, 0, True, call.visibility.window)
    return Call(call.query, call.pages, dense, see, call.scoring), used


def prepared(call: Call, used: np.ndarray, ragged: bool) -> tuple[PreparedCall, tuple[Any, ...], Slots]:
    """A prepared call, its arguments, and the buffer, in which all slots not in use hold NaN."""
    length, dense = call.query.shape[2], call.dense
    rows, at = torch.arange(len(used))[:, None], torch.from_numpy(used)[:, None] + torch.arange(length)
    new = [x[rows, :, at].transpose(1, 2) for x in (dense.keys, dense.values)]
    free = torch.from_numpy(np.arange(SLOTS) >= used[:, None])[:, None, :, None]
    held = [x.masked_fill(free, torch.nan) for x in (dense.keys, dense.values)]
    assert dense.positions is not None
    positions = torch.where(free[:, 0, :, 0], -1, dense.positions).numpy()
    slots = Slots(*held, positions, used.copy(), lambda: torch.empty(0))
    window = call.visibility.window
    inputs = CallInputs(call.query, *new, call.pages, slots, call.scoring, window, None, ragged)
    assert PreparedCall.supports(inputs)
    return PreparedCall(inputs), (call.query, *new, int(used.max()), call.visibility.start), slots


@pairwise("name, codec, ragged", CASES, ["none", "rotated8", "unbiased4", "unbiased3"], [False, True])
def test_against_float64(name: str, codec: str, ragged: bool, isa: str) -> None:
    """Outputs, the tokens stored with their positions, and their count; the second time after ``refit``."""
    length, group, options = CASES[name]
    shape = Shape(64, 64, 32, group, length, len(USED), 2)
    given = make_call(make_case(codec, shape, slots=SLOTS, ragged=ragged, **options))
    call, used = in_slots(given, length, ragged)
    expected = brute_force.attend(call).output
    make, arguments, slots = prepared(call, used, ragged)
    for number in range(2):
        if number:
            _, _, slots = prepared(call, used, ragged)
            assert make.refit(call.pages, slots)
        output = make(*arguments)
        layout = None if call.pages is None else call.pages.layout
        assert_within(output, expected, tolerance_of("output", layout))
        assert (slots.lengths == used + length).all()
        for row, stop in enumerate(used + length):
            assert (slots.positions[row, :stop] == call.dense.positions[row, :stop].numpy()).all()
            for held, true in ((slots.keys, call.dense.keys), (slots.values, call.dense.values)):
                assert torch.equal(held[row, :, :stop], true[row, :, :stop])
                assert held[row, :, stop:].isnan().all()
    assert library.isa() == isa
