"""The Triton kernels that choose pages, in the interpreter or on a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from hf_kvcache.kernels.dispatch import module_of
from hf_kvcache.kernels.inputs import ChoiceInputs, MassRule
from tests.kernels.choices import CASES, Case, equal_scores, expected, make
from tests.kernels.triton.fixtures import poisoned_outputs  # noqa: F401


def _on(inputs: ChoiceInputs, device: torch.device) -> ChoiceInputs:
    """The inputs with their tensors on a device."""
    tensors = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    moved: dict[str, Any] = {name: x.to(device) for name, x in tensors.items() if isinstance(x, torch.Tensor)}
    moved["pages"] = dataclasses.replace(inputs.pages, slabs=[slab.to(device) for slab in inputs.pages.slabs])
    if inputs.sharing is not None:
        moved["sharing"] = dataclasses.replace(inputs.sharing, sinks=inputs.sharing.sinks.to(device))
    return dataclasses.replace(inputs, **moved)


_FAST = CASES[1], CASES[6], CASES[10]


@pytest.mark.parametrize("case", [pytest.param(x, marks=() if x in _FAST else pytest.mark.slow) for x in CASES])
def test_prepared(case: Case, device: torch.device) -> None:
    """The pages that loops in float64 choose, for one query after the other, and what the table says of them."""
    inputs = make(case)
    there = _on(inputs, device)
    choices = module_of("choose", "triton")
    assert choices.PreparedChoice.supports(there)
    call = choices.PreparedChoice(there)
    for seed in (0, 1):
        query = make(case, seed).query
        columns, table = expected(case, dataclasses.replace(inputs, query=query))
        assert torch.equal(call(query.to(device)).cpu(), columns) and torch.equal(there.table.cpu(), table)


def test_equal_scores(device: torch.device) -> None:
    """Of pages with equal scores those that come first are chosen, and infinite ones before all others."""
    case = Case(1, 1, 1, 16, 9, 1, 4, (0.0,))
    inputs = make(case)
    inputs.codes.zero_()
    inputs.codes[0, [2, 5]] = 1
    inputs.scales.fill_(2)
    inputs.query.fill_(1e38)
    columns, table = expected(case, inputs)
    assert columns.tolist() == [[0, 1, 2, 5]]
    there = _on(inputs, device)
    assert torch.equal(module_of("choose", "triton").PreparedChoice(there)(there.query).cpu(), columns)
    assert torch.equal(there.table.cpu(), table)


def test_heads_share_equal_scores(device: torch.device) -> None:
    """Of pages with equal scores those of the first heads are chosen, and of one head those that come first."""
    case, inputs = equal_scores(some=True)
    columns, table = expected(case, inputs)
    there = _on(inputs, device)
    assert torch.equal(module_of("choose", "triton").PreparedChoice(there)(there.query).cpu(), columns)
    assert torch.equal(there.table.cpu(), table)


def test_heads_that_do_not_fit() -> None:
    """Where one program cannot choose from the pages of all heads, no choice is prepared: the reference chooses."""
    case = Case(1, 9, 1, 1, 1025, 1, 1, MassRule(0.01, 1.77), sinks=0)
    choices = module_of("choose", "triton").PreparedChoice
    assert not choices.supports(make(case)) and choices.supports(make(case._replace(columns=1024)))
