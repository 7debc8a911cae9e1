"""The Triton kernels that choose pages, in the interpreter or on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_kvcache.kernels.dispatch import module_of
from hf_kvcache.kernels.inputs import ChoiceInputs
from tests.kernels.choices import CASES, Case, expected, make
from tests.kernels.triton.fixtures import poisoned_outputs  # noqa: F401


def _on(inputs: ChoiceInputs, device: torch.device) -> ChoiceInputs:
    """The inputs with their tensors on a device."""
    tensors = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    moved = {name: x.to(device) for name, x in tensors.items() if isinstance(x, torch.Tensor)}
    pages = dataclasses.replace(inputs.pages, slabs=[slab.to(device) for slab in inputs.pages.slabs])
    return dataclasses.replace(inputs, **moved, pages=pages)


_FAST = CASES[1], CASES[6]


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
