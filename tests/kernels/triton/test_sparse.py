"""Sparse layers that decode by prepared Triton steps, against layers that decode by the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kvcache.kernels import attention, prepared_call
from hf_kvcache.kernels.triton import decode
from tests.kernels.triton.conftest import INTERPRETED
from tests.sparse.test_choice import Sequences

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="its layers are on the CPU")


@pytest.mark.parametrize("padded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_steps(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    """Prepared steps, one of them a page event, read the best pages, as loops in float64 find them."""
    calls: list[bool] = []
    original = decode.PreparedCall.__call__

    def counted(call: Any, *arguments: Any) -> torch.Tensor:
        calls.append(call.pages is not None and call.pages.full)
        return original(call, *arguments)

    def only_decode(op: str, device: torch.device) -> Any:
        return decode if op == "decode" else None

    monkeypatch.setattr(decode.PreparedCall, "__call__", counted)
    for module in (prepared_call, attention):
        monkeypatch.setattr(module, "implementation", only_decode)
    model = Sequences(2, 4, 2, 16, read_budget=0.4, codec="rotated8")
    model.add(61, torch.arange(61) >= torch.tensor([0, 26])[:, None] if padded else None)
    for _ in range(4):
        model.check_step(*model.add(1))
    assert calls == [not padded] * 4
