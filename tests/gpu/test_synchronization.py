"""Plain steps on a GPU do not wait for it; the same on the pretended one, and that a wait is seen."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu.methods import Static, exact
from benchmarks.gpu.pretended_device import DEVICE, PretendedDevice
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.synchronization import Check, checks, keys_and_values, plain_steps
from hf_kvcache import KVCache

ROOT = Path(__file__).parents[2]
ON_GPU = Settings(torch.device("cuda"))


@pytest.mark.cuda
@pytest.mark.parametrize("check", checks(ON_GPU), ids=lambda check: check.name)
def test_on_a_gpu(check: Check) -> None:
    plain_steps(ON_GPU, check)


@pytest.mark.cuda
@pytest.mark.parametrize("codec", ["none", "rotated8", "unbiased4"])
@torch.no_grad()
def test_a_plain_step_can_be_captured(codec: str) -> None:
    """As a CUDA graph, which then gives what the step gives, again and again."""
    steps = []
    for _ in range(2):
        torch.manual_seed(0)
        steps.append(keys_and_values(ON_GPU, partial(KVCache, codec=codec))[1])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            steps[0]()
            steps[1]()
        expected = steps[1]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = steps[0]()
    for _ in range(2):
        found.zero_()
        graph.replay()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_wait_is_seen() -> None:
    cache = SimpleNamespace(layers=[])
    waits = Check("any", lambda: (cache, lambda: torch.ones(2, device=DEVICE).sum().item()))
    asks = Check("any", lambda: (cache, lambda: torch.ones(2, device=DEVICE).sum()))
    with PretendedDevice():
        assert plain_steps(Settings(DEVICE), asks)
        with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation: _local_scalar_dense"):
            plain_steps(Settings(DEVICE), waits)


def test_steps_that_are_not_plain_are_seen() -> None:
    table = SimpleNamespace(lengths=torch.zeros(1))
    cache = SimpleNamespace(layers=[SimpleNamespace(storage=SimpleNamespace(table=table))])
    with pytest.raises(AssertionError, match="not plain"):
        plain_steps(Settings(torch.device("cpu")), Check("any", lambda: (cache, lambda: table.lengths.add_(1))))


@pytest.mark.slow
def test_on_the_pretended_gpu() -> None:
    pytest.importorskip("triton", exc_type=ImportError)
    command = [sys.executable, "-m", "benchmarks.gpu.synchronization"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_static_cache_as_a_bar() -> None:
    """It attends to what it holds, though it reads all its room."""
    draw = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 2, 50, 32, generator=draw) for _ in range(2))
    method = Static(keys, values, 9)
    for _ in range(3):
        new = [torch.randn(2, heads, 1, 32, generator=draw) for heads in (4, 2, 2)]
        keys, values = torch.cat([keys, new[1]], 2), torch.cat([values, new[2]], 2)
        torch.testing.assert_close(method.step(*new).double(), exact(new[0], keys, values), rtol=1e-5, atol=1e-5)
    assert method.bytes_read() == 2 * 2 * 2 * 59 * 32 * 4
