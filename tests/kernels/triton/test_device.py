"""Launches happen on the device of the tensors, and with a Triton that compiles the kernels."""

from __future__ import annotations

import importlib
import importlib.metadata
import operator
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from hf_kvcache.kernels import dispatch, triton
from hf_kvcache.kernels.triton.device import on_their_device

#: What the operations call of their Triton backends.
CALLED = {
    "decode": ("attend",),
    "extend": ("attend",),
    "column_sums": ("column_sums",),
    "latent_decode": ("latent_attend",),
    "hadamard": ("rotate",),
    "pack": ("pack_bits", "decode_side"),
    "encode": ("encode_pages", "key_mean"),
    "key_basis": ("key_basis",),
    "key_scale": ("key_scale",),
    "latent_gather": ("gather_latents",),
    "choose": ("PreparedChoice._launch",),
    "static_step": ("StaticStep.__call__",),
}


class _OnSecondGPU(torch.Tensor):
    device = torch.device("cuda", 1)  # type: ignore[assignment]


def test_the_tensors_device_is_current_while_a_kernel_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer of a model on several GPUs launches on its own device; on the current one nothing is switched."""
    current = [0]
    switched: list[int] = []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        before, current[0] = current[0], wanted.index
        switched.append(wanted.index)
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    launched = on_their_device(lambda name, x: current[0])
    tensor = torch.zeros(1).as_subclass(_OnSecondGPU)
    assert launched("a layout", tensor) == 1 and current == [0]
    current[0] = 1
    assert launched("a layout", tensor) == 1 and switched == [1]
    assert launched("a layout", torch.zeros(1)) == 1 and switched == [1]


@pytest.mark.parametrize("operation", dispatch.OPERATIONS["triton"])
def test_every_operation_switches(operation: str) -> None:
    """Every function that launches kernels switches to the device of its tensors."""
    module = dispatch.module_of(operation, "triton")
    code = on_their_device(lambda x: x).__code__
    assert all(operator.attrgetter(name)(module).__code__ is code for name in CALLED[operation])


@pytest.mark.parametrize(("installed", "runs"), [("3.5.1", False), ("3.6.0", True), ("3.10.0+git1", True)])
def test_the_oldest_triton(installed: str, runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an older Triton the reference runs, and the reason names the installed and the required version."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    triton._reason_against_version.cache_clear()
    try:
        reason = dispatch.reason_missing("triton", "cuda")
    finally:
        triton._reason_against_version.cache_clear()
    assert (reason is None) == runs
    assert runs or (reason is not None and "3.5.1" in reason and "3.6" in reason)
