"""Tests with the marker ``cuda`` are skipped where they cannot run."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = reason_to_skip()
    if reason is not None:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=reason))


def reason_to_skip() -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    from hf_kvcache.kernels.triton.attention_kernels import pages_kernel

    if type(pages_kernel).__name__ == "InterpretedFunction":
        return "tests/kernels/triton runs the kernels in the interpreter: run pytest on tests/gpu alone"
    return None
