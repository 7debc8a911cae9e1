"""The pretended GPU: what it counts and refuses, and runs of ``generate()`` on it within their budgets."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import pretended_device
from benchmarks.gpu.pretended_device import DEVICE, KINDS, PretendedDevice
from hf_kvcache.kernels.workspace import scratch

ROOT = Path(__file__).parents[2]
BUDGET = ROOT / "benchmarks" / "gpu" / "pretended.csv"
FEW = ("4 bits", "4 bits, padded batch", "snapkv, 4 bits", "latents, 8 bits, padded batch", "4 bits, prompt lookup")


def mask() -> torch.Tensor:
    return torch.zeros(4, dtype=torch.bool, device="cuda")


#: What is done with a tensor of the device, and the operators, uploads, read-backs and waits that a GPU needs for it.
COSTS: dict[str, tuple[Callable[[torch.Tensor], Any], tuple[int, int, int, int]]] = {
    "operator": (lambda x: x * 2, (1, 0, 0, 0)),
    "in place": (lambda x: x.add_(1), (1, 0, 0, 0)),
    "views": (lambda x: x[1:, None].expand(3, 2).T, (0, 0, 0, 0)),
    "memory": (lambda x: torch.empty_like(x), (0, 0, 0, 0)),
    "upload": (lambda x: torch.ones(3).to(x.device), (0, 1, 0, 1)),
    "upload that does not wait": (lambda x: torch.ones(3).to("cuda", non_blocking=True), (0, 1, 0, 0)),
    "from an array": (lambda x: torch.from_numpy(np.ones(3)).to(x.device), (0, 1, 0, 1)),
    "from a list": (lambda x: torch.tensor([1, 2], device=x.device), (0, 1, 0, 1)),
    "copied into": (lambda x: x.copy_(torch.ones(4)), (0, 1, 0, 1)),
    "a number": (lambda x: x[0].item(), (0, 0, 1, 1)),
    "a condition": (lambda x: bool(x[0] > 0), (1, 0, 1, 1)),
    "a list": (lambda x: x.tolist(), (0, 0, 1, 1)),
    "to the host": (lambda x: x.cpu().numpy(), (0, 0, 1, 1)),
    "copied to the host": (lambda x: torch.empty(4).copy_(x), (0, 0, 1, 1)),
    "nonzero": (lambda x: x.nonzero(), (1, 0, 1, 1)),
    "a mask as an index": (lambda x: x[mask()], (2, 0, 1, 1)),
    "a mask that is filled": (lambda x: x.__setitem__(mask(), 0.0), (2, 0, 0, 0)),
    "an index on the host": (lambda x: x[torch.tensor([0, 2])], (1, 1, 0, 1)),
    "an index on the device": (lambda x: x[torch.arange(2, device="cuda")], (2, 0, 0, 0)),
    "distinct values": (lambda x: x.unique(), (1, 0, 1, 1)),
    "a factor that may not exist": (lambda x: torch.linalg.cholesky(torch.diag(x + 1)), (4, 0, 1, 1)),
    "a number of the host": (lambda x: x + torch.tensor(1.0), (1, 0, 0, 0)),
}


@pytest.mark.parametrize("name", COSTS)
def test_what_a_gpu_would_be_asked(name: str) -> None:
    action, expected = COSTS[name]
    with PretendedDevice() as device:
        x = torch.zeros(4, device="cuda")
        with device.counting() as counted:
            action(x)
    assert tuple(counted.all[kind] for kind in KINDS[1:]) == expected
    assert not any(counted.own.values())  # the package did not ask for it


def test_a_tensor_is_on_a_gpu() -> None:
    """What branches look at; numbers are those of the host; two devices do not mix."""
    with PretendedDevice():
        x = torch.arange(3.0, device="cuda")
        assert x.is_cuda and x.device == DEVICE and torch.cuda.get_device_capability(x.device) == (9, 0)
        assert ((x + 1) @ x).item() == 8.0 and x.to("cuda") is x and x[1:].untyped_storage().data_ptr() == x.data_ptr()
        assert type(torch.empty(3).copy_(x)) is torch.Tensor and x.copy_(x + 1) is x
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        with pytest.raises(TypeError, match="to numpy"):
            x.numpy()
    with pytest.raises(RuntimeError, match="outside"):
        x + 1


def test_each_stream_has_its_own_scratch_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels on two streams run at the same time, so they must not write to the same buffer."""
    with PretendedDevice():
        buffers = []
        for number in (0, 7, 0):
            monkeypatch.setattr(torch.cuda, "current_stream", lambda *_, own=number: SimpleNamespace(cuda_stream=own))
            buffers.append(scratch("a test", (4,), torch.float32, DEVICE).data_ptr())
    assert buffers[0] == buffers[2] != buffers[1]


def test_the_line_that_asks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here this folder stands for the package."""
    monkeypatch.setattr(pretended_device, "_PACKAGE", str(Path(__file__).parent))
    with PretendedDevice() as device, device.counting() as counted:
        torch.ones(1, device="cuda").item()
    assert counted.own == counted.all and counted.own["readbacks"] == 1
    (place,) = (place for kind, place in counted.places if kind == "readbacks")
    assert place.startswith("hf_kvcache/test_pretended.py:")


def runs(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs on the pretended GPU, in a process of its own: Triton is patched there."""
    pytest.importorskip("triton", exc_type=ImportError)
    command = [sys.executable, "-m", "benchmarks.gpu.pretended_runs", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval")])}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_runs_stay_within_their_budget(tmp_path: Path) -> None:
    """Nothing is above the budget, but for the one count that is said to be too high."""
    with BUDGET.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    changed = next(row for row in rows if (row["run"], row["moment"]) == ("4 bits", "step"))
    found, changed["kernels"] = changed["kernels"], "0"
    path = tmp_path / "budget.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(changed))
        writer.writeheader()
        writer.writerows(rows)
    done = runs("--uncompiled", "--check", str(path), "--only", *FEW)
    assert done.returncode == 1 and " 0 failures" in done.stdout, done.stdout + done.stderr
    wrong = [line for line in done.stdout.splitlines() if "are allowed" in line or "no budget" in line]
    assert len(wrong) == 1 and wrong[0].startswith("4 bits, step: ") and int(found) > 0, done.stdout


@pytest.mark.slow
def test_all_runs_compiled_for_sm_90() -> None:
    """Every path launches, with kernels that compile and fit on an H100."""
    done = runs("--check")
    assert done.returncode == 0, done.stdout + done.stderr
