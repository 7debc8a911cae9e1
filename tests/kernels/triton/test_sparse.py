"""Sparse layers that decode by prepared Triton steps, against layers that decode by the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kvcache.kernels import attention, prepared_call
from hf_kvcache.kernels import choose as dispatched_choice
from hf_kvcache.kernels.triton import choose, decode
from tests.kernels.triton.conftest import INTERPRETED
from tests.sparse.test_choice import Sequences

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="its layers are on the CPU")


@pytest.mark.parametrize("padded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_steps(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    """Prepared steps, one of them a page event, read the best pages, as loops in float64 find them."""
    calls: list[bool] = []
    choices: list[int] = []
    pick = choose.PreparedChoice.__call__
    original = decode.PreparedCall.__call__

    def counted(call: Any, *arguments: Any) -> torch.Tensor:
        calls.append(call.pages is not None and call.pages.full)
        return original(call, *arguments)

    def chosen(call: Any, query: torch.Tensor) -> torch.Tensor:
        choices.append(1)
        return pick(call, query)

    def of_a_step(op: str, device: torch.device) -> Any:
        return {"decode": decode, "choose": choose}.get(op)

    monkeypatch.setattr(decode.PreparedCall, "__call__", counted)
    monkeypatch.setattr(choose.PreparedChoice, "__call__", chosen)
    for module in (prepared_call, attention, dispatched_choice):
        monkeypatch.setattr(module, "implementation", of_a_step)
    model = Sequences(2, 4, 2, 16, read_budget=0.4, codec="rotated8")
    model.add(61, torch.arange(61) >= torch.tensor([0, 26])[:, None] if padded else None)
    for _ in range(4):
        model.check_step(*model.add(1))
    assert calls == [not padded] * 4 and len(choices) == 4
