"""A prepared decode step by Triton kernels against one softmax per query over all tokens, in float64."""

from __future__ import annotations

import threading
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from hf_kvcache.kernels.inputs import CallInputs, Pages, Scoring, Slots
from hf_kvcache.kernels.triton import step as steps
from hf_kvcache.kernels.triton.step import PreparedCall, supports
from hf_kvcache.kernels.workspace import scratch
from tests.choosing import chosen
from tests.kernels.triton.calls import Call, Random, Shape, biased, expected, make_call, ragged, scattered
from tests.kernels.triton.conftest import INTERPRETED
from tests.kernels.triton.fixtures import bfloat16_dot, poisoned_outputs  # noqa: F401
from tests.tolerances import assert_near

#: Slots of the buffer behind those in use, which hold NaN.
SPARE = 3


class Step:
    """An attention call of one new token, whose last full-precision token is the new one, as a prepared call."""

    def __init__(self, call: Call) -> None:
        self.call, dense = call, call.dense
        assert dense.positions is not None
        batch, heads, held, _ = dense.keys.shape
        self.slot = held - 1
        room = held + SPARE
        keys, values = (x.new_full((batch, heads, room, x.shape[3]), torch.nan) for x in (dense.keys, dense.values))
        keys[:, :, : self.slot], values[:, :, : self.slot] = dense.keys[:, :, :-1], dense.values[:, :, :-1]
        positions = np.full((batch, room), 1 << 40, dtype=np.int64)
        positions[:, : self.slot] = dense.positions[:, :-1].cpu().numpy()
        self.there = torch.from_numpy(positions.copy()).to(keys.device)
        lengths = np.full(batch, self.slot, dtype=np.int64)
        self.slots = Slots(keys, values, positions, lengths, lambda: self.there)
        self.keys, self.values = new_token(dense.keys), new_token(dense.values)
        self.position = call.visibility.start

    @property
    def inputs(self) -> CallInputs:
        call = self.call
        return CallInputs(
            call.query, self.keys, self.values, call.pages, self.slots, call.scoring, call.visibility.window
        )

    def run(self, prepared: PreparedCall, slot: int | None = None) -> torch.Tensor:
        """The output, with NaN in all memory that the kernels are to write."""
        for tag in ("partial", "lse"):
            scratch(f"triton.{tag}", (1 << 16,), torch.float32, self.keys.device).fill_(torch.nan)
        return prepared(self.call.query, self.keys, self.values, self.slot if slot is None else slot, self.position)

    def state(self) -> torch.Tensor:
        """The lengths as a tensor."""
        columns = 0 if self.call.pages is None else self.call.pages.columns
        numbers = [self.position, columns, *self.slots.lengths.tolist()]
        return torch.tensor(numbers, device=self.keys.device)


def new_token(tokens: torch.Tensor) -> torch.Tensor:
    """The last of some tokens ``[B, H, n, D]``, in the layout in which a model's projection gives it."""
    return tokens[:, :, -1:].transpose(1, 2).contiguous().transpose(1, 2)


def check(call: Call) -> None:
    """Two equal calls give the right output, store the token and nothing else, and so does the form with a state."""
    outputs, sums = [], Sums(call)
    for with_state in (False, True):
        step = Step(call)
        state = step.state() if with_state else None
        before = None if state is None else state.clone()
        assert supports(step.inputs)
        prepared = PreparedCall(step.inputs if with_state else replace(step.inputs, sums=sums.both), state)
        for _ in range(2):
            if state is not None and before is not None:
                state.copy_(before)
            outputs.append(step.run(prepared, -1 if with_state else None))
            if state is not None and before is not None:
                assert state.tolist() == [before[0] + 1, before[1], *(before[2:] + 1).tolist()]
        stored(step)
    for output in outputs:
        assert output.dtype == call.query.dtype
        assert torch.equal(output.view(torch.uint8), outputs[0].view(torch.uint8))
    sums.check(calls=2)
    assert_near(outputs[0].cpu(), expected(call).output)


class Sums:
    """Sums of probabilities to which a call adds; there is room for more than it has."""

    def __init__(self, call: Call) -> None:
        self.call, (batch, self.heads, slots, _) = call, call.dense.keys.shape
        places = 0 if call.pages is None else call.pages.columns * call.pages.layout.page_size
        rooms = slots + SPARE + 2, places + 1
        dense, pages = (torch.ones(batch, self.heads, room, device=call.query.device) for room in rooms)
        self.both = dense, pages

    def check(self, calls: int) -> None:
        """Fail unless the sums are those of some calls, added to 1, and nothing else was written."""
        wanted = expected(self.call)
        for found, by_head in zip(self.both, (wanted.dense_sums, wanted.page_sums), strict=True):
            assert by_head is not None
            added = calls * by_head.unflatten(1, (self.heads, -1)).mean(2)
            whole = 1 + torch.nn.functional.pad(added, (0, found.shape[2] - added.shape[2]))
            # Queries of 16 bits meet pages in half precision.
            assert_near(found.cpu(), whole, None if self.call.query.dtype == torch.float32 else torch.float16)


def stored(step: Step) -> None:
    """Fail unless the buffer holds the tokens before the new one, the new one, and NaN behind it."""
    dense, slots, count = step.call.dense, step.slots, step.slot + 1
    for held, wanted in ((slots.keys, dense.keys), (slots.values, dense.values)):
        assert torch.equal(held[:, :, :count], wanted) and held[:, :, count:].isnan().all()
    if step.call.visibility.window is not None and dense.positions is not None:
        assert torch.equal(step.there[:, :count], dense.positions)


@chosen(
    "spec, dtype",
    ["unbiased4", "rotated8", "none", "int4", "fp8", "kvarn2"],
    [torch.float32, torch.bfloat16],
    fast=[("unbiased4", torch.bfloat16), ("int4", torch.float32)],
)
def test_codecs(spec: str, dtype: torch.dtype, device: torch.device) -> None:
    check(make_call(spec, Shape(dtype=dtype, heads=1, columns=7, slots=9), device=device))


SHAPES = {
    "one query head": Shape(group=1),
    "odd groups": Shape(group=7, batch=2, heads=1),
    "more query heads than a program takes": Shape(group=35, heads=1, batch=1),
    "width 80": Shape(key_dim=80, value_dim=80),
    "width 128": Shape(key_dim=128, value_dim=128),
    "unequal widths": Shape(key_dim=64, value_dim=96, group=3),
    "batch": Shape(batch=3, heads=3),
    "no pages": Shape(columns=0),
    "nothing but the token": Shape(columns=0, slots=1),
    "an empty buffer": Shape(slots=1, columns=1),
    "several splits of slots": Shape(slots=140, columns=2, heads=1),
    "several splits of pages": Shape(columns=19, heads=1),
}


@chosen("name", SHAPES, fast=[("width 80",), ("odd groups",), ("nothing but the token",), ("several splits of slots",)])
def test_shapes(name: str, device: torch.device) -> None:
    check(make_call("unbiased4", SHAPES[name], device=device))


def with_window(call: Call, window: int) -> Call:
    return replace(call, visibility=replace(call.visibility, window=window))


@chosen("window, gaps", [1, 4, 20, 41, 1000], [False, True], fast=[(20, True)])
def test_windows(window: int, gaps: bool, device: torch.device) -> None:
    call = make_call("int8", Shape(columns=3, slots=6, heads=1, batch=2), device=device)
    check(with_window(scattered(call) if gaps else call, window))


@chosen("windowed", [False, True], fast=[(False,)])
def test_rows_of_unequal_length(windowed: bool, device: torch.device) -> None:
    call = ragged(make_call("unbiased4", Shape(columns=4, heads=1, batch=2), device=device))
    check(with_window(call, 60) if windowed else call)


@chosen("softcap, sink", [None, 2.0], [None, torch.float32, torch.bfloat16], fast=[(2.0, torch.bfloat16)])
def test_scoring(softcap: float | None, sink: torch.dtype | None, device: torch.device) -> None:
    call = make_call("rotated4", Shape(batch=2, heads=1, group=3), device=device)
    logits = None if sink is None else Random(5).normal(3).to(sink).to(device)
    check(replace(call, scoring=Scoring(0.3, softcap, logits)))


def test_a_sequence_of_tokens(device: torch.device) -> None:
    """One prepared call for one token after the other, each attending to those that it stored before."""
    call = make_call("unbiased4", Shape(heads=1, slots=SPARE + 4), device=device)
    dense = call.dense
    start = call.visibility.start - SPARE
    step = Step(replace(call, dense=dense.until(4), visibility=replace(call.visibility, start=start)))
    prepared = PreparedCall(step.inputs)
    state = step.state()
    on_device = Step(step.call)
    captured = PreparedCall(on_device.inputs, state)
    for number in range(SPARE + 1):
        seen = dense.until(4 + number)
        now = replace(call, dense=seen, visibility=replace(call.visibility, start=step.position + number))
        keys, values = new_token(seen.keys), new_token(seen.values)
        output = prepared(call.query, keys, values, step.slot + number, step.position + number)
        assert_near(output.cpu(), expected(now).output)
        assert torch.equal(output, captured(call.query, keys, values, 0, 0))
    assert step.slots.lengths.tolist() == [SPARE + 4]
    assert step.slots.positions[0, 3:].tolist() == [start, start + 1, start + 2, start + 3]


def test_an_interrupted_call_says_nothing_of_the_next_token(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The general path stores its token then, and the call after that has to see it."""
    call = make_call("unbiased4", Shape(heads=1, slots=6), device=device)
    dense, start = call.dense, call.visibility.start - 1
    step = Step(replace(call, dense=dense.until(5), visibility=replace(call.visibility, start=start)))
    prepared = PreparedCall(replace(step.inputs, ragged=True))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(prepared, "_launch", Mock(side_effect=KeyboardInterrupt))
        step.run(prepared)
    for held, given in ((step.slots.keys, dense.keys), (step.slots.values, dense.values)):
        held[:, :, step.slot] = given[:, :, step.slot]
    step.slots.lengths += 1
    output = prepared(call.query, new_token(dense.keys), new_token(dense.values), step.slot + 1, start + 1)
    assert_near(output.cpu(), expected(call).output)


@pytest.mark.slow
def test_a_grid_for_more_pages_than_there_are(device: torch.device) -> None:
    """With a state, the grid may be made for pages that are still to come; the table grows in place."""
    call = make_call("unbiased4", Shape(columns=8, heads=1), device=device)
    assert call.pages is not None
    all_pages: Pages = call.pages
    step = Step(call)
    state = step.state()
    prepared = PreparedCall(step.inputs, state, columns=8)
    for columns in (8, 1, 5):
        state[1] = columns
        state[0], state[2] = step.position, step.slot
        fewer = replace(
            call, pages=all_pages.until(columns), keys=call.keys[:, :columns], values=call.values[:, :columns]
        )
        assert_near(step.run(prepared).cpu(), expected(fewer).output)


@pytest.mark.skipif(not INTERPRETED, reason="no such streams on a GPU")
def test_a_step_on_another_stream_asks_for_scratch_memory_there(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(steps, "scratch", lambda tag, *rest: (asked.append(tag), scratch(tag, *rest))[1])
    each = Step(make_call(None, Shape(columns=0), device=device))
    prepared = PreparedCall(each.inputs)
    for stream, count in ((0, 2), (7, 4), (7, 4), (0, 6)):
        monkeypatch.setattr(steps, "current_stream", lambda device, own=stream: own)
        each.run(prepared)
        assert len(asked) == count


def test_other_threads_have_their_own_scratch_memory(device: torch.device) -> None:
    step = Step(make_call(None, Shape(columns=0), device=device))
    prepared = PreparedCall(step.inputs)
    first, found = step.run(prepared), []
    thread = threading.Thread(target=lambda: found.append(step.run(prepared)))
    thread.start()
    thread.join()
    assert torch.equal(first, found[0])


@pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter")
@pytest.mark.parametrize("spec", ["unbiased4", "rotated8", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(spec: str, dtype: torch.dtype, device: torch.device) -> None:
    """A usual size, with many splits."""
    shape = Shape(2, 8, 4, 1, 128, 128, page_size=128, columns=64, slots=200, dtype=dtype)
    check(make_call(spec, shape, device=device))


def test_what_is_left_to_the_general_path(device: torch.device) -> None:
    step = Step(make_call("unbiased4", Shape(), device=device))
    inputs = step.inputs
    assert supports(inputs)
    spread = torch.zeros(*inputs.query.shape[:3], 128, device=device)[..., ::2]
    assert not supports(replace(inputs, query=spread))
    assert not supports(replace(inputs, keys=inputs.keys.half()))
    assert inputs.pages is not None
    assert not supports(replace(inputs, pages=replace(inputs.pages, heads=1)))


@pytest.mark.parametrize("spec", ["rotated4", pytest.param("none", marks=pytest.mark.slow)])
def test_bias(spec: str, device: torch.device) -> None:
    """A bias per token in pages, of which some lost tokens."""
    check(biased(ragged(make_call(spec, Shape(heads=1, columns=2), device=device))))
