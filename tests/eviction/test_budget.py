"""Budgets and pins: what they accept, how many tokens they mean, and which."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_kvcache.eviction.budget import Budget, Pins
from tests.eviction.toys import HEADS, PAGE, SINKS, TAIL, Toy, states


@pytest.mark.parametrize("amount", [0.0, 1.0, -0.5, 1.5, "half", None, True, float("nan"), 3.0])
def test_amounts_that_are_none(amount: Any) -> None:
    with pytest.raises(
        ValueError, match=r"budget=.*accepted: a whole number of tokens, or a share above 0 and below 1"
    ):
        Budget(amount, 6)


@pytest.mark.parametrize("amount", [5, 0, -1])
def test_amounts_too_small(amount: int) -> None:
    with pytest.raises(ValueError, match=rf"budget={amount}; accepted: from 6 tokens"):
        Budget(amount, 6)


def test_tokens() -> None:
    """A number is what it is; a share is of the non-padding tokens seen, and never less than what always stays."""
    assert [Budget(32, 6).tokens(seen) for seen in (0, 10, 1000)] == [32, 32, 32]
    assert [Budget(0.3, 6).tokens(seen) for seen in (0, 10, 20, 100, 1001)] == [6, 6, 6, 30, 300]
    assert Budget(6, 6).tokens(1000) == 6


@pytest.mark.parametrize("pin", [(3, 3), (5, 2), (-1, 4), (1.0, 4), (1, 2, 3), [0, 4], range(0, 8, 2), 7, "0-4"])
def test_pins_that_are_none(pin: Any) -> None:
    with pytest.raises(ValueError, match=r"pin=.*accepted: \(start, stop\)"):
        Pins(pin)


@pytest.mark.parametrize("mask", [torch.ones(4, dtype=torch.bool), torch.ones(1, 4), torch.ones(1, 1, 4).bool()])
def test_masks_that_are_none(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"pin of shape .*accepted: a bool mask \[B, tokens\]"):
        Pins(mask)


def test_mask_of_another_batch() -> None:
    with pytest.raises(ValueError, match="mask of 2 sequences; accepted: 3"):
        Pins(torch.ones(2, 4).bool()).by_row(3)


def test_counts() -> None:
    assert Pins(None).count == 0 and Pins((3, 9)).count == 6 and Pins(range(2)).count == 2
    assert Pins(torch.tensor([[True, False, True], [True, False, False]])).count == 2


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), batch=st.integers(1, 3), start=st.integers(0, 6), length=st.integers(1, 8))
def test_span_is_over_non_padding_tokens(data: st.DataObject, batch: int, start: int, length: int) -> None:
    """However the tokens of a sequence come, padding between them, the pinned ones are those in the span."""
    pinned, real = Pins((start, start + length)).by_row(batch), np.zeros((batch, 0), bool)
    for _ in range(data.draw(st.integers(1, 6))):
        new = data.draw(st.integers(1, 6))
        row = st.lists(st.booleans(), min_size=new, max_size=new)
        valid = np.array([data.draw(row) for _ in range(batch)])
        pinned.see(real.shape[1], new, None if valid.all() else valid)
        real = np.concatenate([real, valid], 1)
        if data.draw(st.booleans()) and data.draw(st.booleans()):
            cut = data.draw(st.integers(0, real.shape[1]))
            pinned.forget(real[:, cut:].sum(1), cut)
            real = real[:, :cut]
        if data.draw(st.booleans()):
            rows = np.array(data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch)))
            pinned, real = pinned.select(rows), real[rows]
    number = real.cumsum(1) - 1
    expected = real & (number >= start) & (number < start + length)
    everywhere = torch.arange(real.shape[1] + 5).expand(batch, 1, -1)
    pins = pinned.at(np.arange(batch), everywhere)
    found = np.zeros(everywhere.shape, bool)[:, 0] if pins is None else pins[:, 0].numpy()
    assert np.array_equal(found[:, : real.shape[1]], expected) and not found[:, real.shape[1] :].any()
    known = np.tile(np.array(data.draw(st.lists(st.integers(0, 20), max_size=3, unique=True)), np.int64), (batch, 1))
    outside = [np.delete(row, [at for at in known[0] if at < len(row)]).sum() for row in expected]
    assert pinned.most_outside(np.arange(batch), known) == max(outside, default=0)
    assert pinned.counts.tolist() == real.sum(1).tolist()
    for row in range(batch):
        at = np.flatnonzero(real[row])
        assert pinned.numbers(np.array([row]), at[None])[0].tolist() == list(range(len(at)))
        on_device = pinned.numbers_on_device(np.array([row]), torch.from_numpy(at)[None, None])
        assert on_device[0, 0].tolist() == list(range(len(at)))


def test_mask_is_by_position() -> None:
    """Of a mask the columns are tokens seen, padding included; the rows go with their sequences."""
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[0, 10:13], mask[1, 25] = True, True
    toy, given = Toy("knorm", pin=mask, budget=16), states(100, 2)
    real = torch.ones(2, 100, dtype=torch.bool)
    real[0, :10] = False  # the mask pins the first tokens of the padded sequence
    toy(given, real)
    assert all({10, 11, 12} <= set(head) for head in toy.positions(0))
    assert all(25 in head for head in toy.positions(1))
    assert not all(25 in head for head in toy.positions(0))
    toy.cache.batch_select_indices(torch.tensor([1]))
    toy.run(states(3 * PAGE))
    assert all(25 in head for head in toy.positions(0))


def test_pins_come_out_of_the_budget() -> None:
    """Pinned tokens count, and a budget too small for them is refused when the cache is built."""
    toy = Toy("knorm", pin=(20, 40), budget=30)
    toy(states(100))
    assert [len(head) for head in toy.positions()] == [30] * HEADS
    with pytest.raises(ValueError, match="budget=25; accepted: from 26 tokens"):
        Toy("knorm", pin=(20, 40), budget=25)


def test_share() -> None:
    """A share follows the sequence: of each row by its own non-padding tokens, and it grows while decoding."""
    toy, real = Toy("knorm", budget=0.3), torch.arange(120) >= torch.tensor([[0], [40]])
    given = states(120, 2)
    toy(given.at(0, 100), real)
    assert [len(toy.positions(row)[0]) for row in (0, 1)] == [30, 18]
    for at in range(100, 116):
        toy(given.at(at, at + 1), real)
    assert [len(toy.positions(row)[0]) for row in (0, 1)] == [round(0.3 * 116), round(0.3 * 76)]


def test_padding_that_does_not_go_together_is_refused() -> None:
    """Saved places of padding are told apart by how many each sequence has; nothing is taken over if they differ."""
    pinned = Pins((0, 4)).by_row(2)
    pinned.see(0, 6, np.array([[True] * 6, [False] * 2 + [True] * 4]))
    state = pinned.state()
    other = Pins((0, 4)).by_row(2)
    with pytest.raises(ValueError, match="'padding' has 2 positions, 'padding_lengths' 3"):
        other.restore(state | {"padding_lengths": torch.tensor([1, 2])})
    assert not other.counts.any()
    other.restore(state)
    assert {name: x.tolist() for name, x in other.state().items()} == {name: x.tolist() for name, x in state.items()}
    assert other.numbers(np.array([1]), np.array([[2, 5]])).tolist() == [[0, 3]]


@pytest.mark.parametrize("codec", ["none", "unbiased4"])
def test_a_packed_prompt_of_which_no_page_stays(codec: str) -> None:
    """The least budget, sinks and tail, where a prompt was packed before the first choice."""
    toy = Toy("snapkv", codec, budget=SINKS + TAIL, evict_prefill=None)
    toy.run(states(62, 2), [60])
    assert toy.kept().positions == [[*range(SINKS), *range(62 - TAIL, 62)]] * HEADS
