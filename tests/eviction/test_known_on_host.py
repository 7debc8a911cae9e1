"""What the host knows of an eviction without asking the device is what the device would say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_kvcache.eviction.layer_selection import LayerSelection
from hf_kvcache.storage.token_view import TokenView
from hf_kvcache.storage.transfers import ascending_on, front, is_run, rows_of, tokens_of
from tests.eviction.toys import Toy, states


@settings(max_examples=50, deadline=None, derandomize=True)
@given(mask=st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4), more=st.integers(0, 3))
def test_front_is_nonzero(mask: list[list[bool]], more: int) -> None:
    given_mask = torch.tensor(mask)
    found = front(given_mask, int(given_mask.sum(-1).max()) + more)
    for row, places in zip(given_mask, found, strict=True):
        wanted = row.nonzero().flatten().tolist()
        assert places.tolist() == wanted + [0] * (len(places) - len(wanted))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(numbers=st.lists(st.integers(0, 6), min_size=1, max_size=5, unique=True), rows=st.integers(1, 3))
def test_runs_need_no_index(numbers: list[int], rows: int) -> None:
    """In order and out of order, with gaps and without: the same as an index gives."""
    x, index = torch.randn(7, 2, 7), np.array(numbers)
    assert torch.equal(rows_of(x, index), x[index]) and torch.equal(tokens_of(x, index), x[:, :, index])
    assert is_run(index) == (numbers == list(range(numbers[0], numbers[0] + len(numbers))))
    ascending = np.tile(np.sort(index), (rows, 1))
    ascending[-1] += len(numbers) % 2  # rows that differ
    assert ascending_on(x.device, ascending).tolist() == ascending.tolist()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "pages that share scales": {"codec": "int8"},
    "pins": {"pin": (9, 15)},
    "pins among the sinks": {"pin": (0, 4)},
    "interval": {"interval": 3},
    "long window": {"policy": "ada-expected"},
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_counts_and_reach(case: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many tokens are protected, held and kept, and how far queries see, at every choice of a generation."""
    looked = 0
    chosen, context = LayerSelection.chosen, LayerSelection.context

    def look(selection: LayerSelection, held: TokenView) -> Any:
        assert selection.most_protected(held) == int(selection.protected(held, 0).sum(-1).max())
        assert held.counts.tolist() == held.exists.sum(-1).tolist()
        choice = chosen(selection, held)
        if choice.keep is not None:
            assert (choice.keep.sum((1, 2)) <= choice.most * choice.keep.shape[1]).all()
            assert not torch.equal(choice.keep & held.exists, held.exists)
        return choice

    def look_closer(selection: LayerSelection, held: TokenView, *arguments: Any) -> Any:
        nonlocal looked
        found = context(selection, held, *arguments)
        assert found.query_positions is not None and found.reach is not None
        for number, at in enumerate(found.query_positions.amax(0).tolist()):
            seen = int((found.positions <= at).sum(-1).max())
            assert seen <= found.reach(number) <= held.tokens
            assert held.columns or seen == found.reach(number)
            looked += 1
        latest = replace(found, queries=found.queries[:, :, -1:], query_positions=found.query_positions[:, -1:])
        assert torch.equal(latest.received(), replace(latest, reach=None).received())  # a policy may take some of them
        if found.aligned:
            assert (found.positions == found.positions[:, :1]).all()
        return found

    monkeypatch.setattr(LayerSelection, "chosen", look)
    monkeypatch.setattr(LayerSelection, "context", look_closer)
    options = dict(CASES[case])
    toy = Toy(options.pop("policy", "snapkv"), options.pop("codec", "none"), **options)
    real = torch.ones(2, 75, dtype=torch.bool)
    real[0, :7] = not padded
    toy.run(states(75, 2), [60], real if padded else None)
    assert looked
