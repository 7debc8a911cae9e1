"""Calibration and the evaluation over two processes of a launcher give what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import distributed, multiprocessing

from hf_kvcache.cli import main as cli
from hf_kvcache.eviction import calibration
from hf_kvcache.lowrank import Projection, calibrate
from hf_kvcache.lowrank.moment_collection import collect
from hf_kvcache.lowrank.moments import States
from hf_kvcache.utils import processes
from hf_kvcache_eval import runner
from hf_kvcache_eval.comparison import Comparison
from hf_kvcache_eval.fidelity import Fidelity
from hf_kvcache_eval.protocol import Protocol
from hf_kvcache_eval.suites import Entry
from tests import families
from tests.eval.tiny import LetterTokenizer
from tests.lowrank.test_calibration import TEXTS, Letters

SIZES: dict[str, Any] = {"tokens": 60, "length": 7}


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert processes.joined() == processes.ALONE and processes.own_device("cuda") == "cuda"
    with processes.launched() as launch:
        assert launch == processes.ALONE and launch.gathered(3) == [3]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [processes.own_device(name) for name in (None, "cpu", "cuda", "cuda:3")] == [None, "cpu", "cuda:1", "cuda:3"]


def measured(shared: processes.Processes) -> dict[str, torch.Tensor]:
    """Moments and query statistics of a tiny model. Bases are made of the moments, up to signs."""
    model = families.build("llama")
    moments = collect(model, TEXTS, Letters(), **SIZES, sinks=2, progress=False, processes=shared)
    found = {"tokens": torch.tensor(moments.tokens)}
    for index, layer in moments.layers.items():
        for name, value in vars(layer).items():
            parts = {"": value} if isinstance(value, torch.Tensor) else vars(value) if isinstance(value, States) else {}
            found |= {f"{index} {name} {part}": x for part, x in parts.items()}
    queries = calibration.calibrate(model, TEXTS, Letters(), **SIZES, processes=shared)
    for index, statistics in queries.layers.items():
        found |= {f"{index} mean": statistics.mean, f"{index} length": statistics.length}
    return found


def compared(folder: Path, shared: processes.Processes) -> list[Any]:
    """Cells of three caches on two tasks."""
    model = families.build("llama")
    task = Fidelity(prefix=48, suffix=8, windows=2, batch=2)
    runner.load_default_model = lambda *_: (model, LetterTokenizer())
    runner.suite = lambda *_: [(f"fidelity@{n}", Entry(replace(task, prefix=n))) for n in (48, 40)]
    comparison = Comparison(folder, ["full", "int2", "rotated4"], protocol=Protocol(2, 8, 16, block=4))
    return runner.run(comparison, Console(quiet=True), shared)


def check_in_process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    try:
        shared = processes.joined()
        assert (shared.rank, shared.count) == (rank, 2)
        found, expected = measured(shared), torch.load(folder / "measured")
        assert found.keys() == expected.keys() and found["tokens"] == expected["tokens"]
        for name, x in expected.items():
            # Sums in float64, in another order; statistics are kept in float32.
            scale = 1e-12 if x.dtype == torch.float64 else 1e-6
            torch.testing.assert_close(found[name], x, rtol=scale, atol=scale * float(x.abs().max()), msg=name)
        with pytest.raises(ValueError, match="fewer chunks than processes: some of the 2 have read nothing"):
            calibrate(families.build("llama"), TEXTS[:1], Letters(), sinks=2, progress=False, processes=shared)
        cells = compared(folder / "two", shared)
        torch.save([(cell.cache, cell.task, cell.status, cell.metrics) for cell in cells], folder / f"cells {rank}")
        written = len(list((folder / "two" / "cells").iterdir()))
        assert written == 6 and [cell.status for cell in cells] == ["done"] * 6
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load_default_model", "suite"):
        monkeypatch.setattr(runner, name, getattr(runner, name))
    torch.save(measured(processes.ALONE), tmp_path / "measured")
    cells = compared(tmp_path / "one", processes.ALONE)
    multiprocessing.spawn(check_in_process, (tmp_path,), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"cells {rank}", weights_only=False)
        assert found == [(cell.cache, cell.task, cell.status, cell.metrics) for cell in cells]


#: What a launcher starts: the command with the tiny model.
COMMAND = """
import sys
from hf_kvcache.cli import main, models
from tests import families
from tests.lowrank.test_calibration import Letters

models.load_default_model = lambda *_: (families.build("llama"), Letters())
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_command_under_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    (tmp_path / "text.txt").write_text("".join(TEXTS))
    (tmp_path / "command.py").write_text(COMMAND)
    words = ["calibrate", "--texts", str(tmp_path / "text.txt"), "--tokens", "60", "--length", "7", "--out"]
    monkeypatch.setattr("hf_kvcache.cli.models.load_default_model", lambda *_: (families.build("llama"), Letters()))
    assert cli.main([*words, str(tmp_path / "one")]) == 0
    for launcher in (
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
        ["torch.distributed.run", "--nproc-per-node", "2"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *launcher, str(tmp_path / "command.py"), *words, str(tmp_path / "two")],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ
            | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("bases of 2 layers") == 1
        one, two = (Projection.load(tmp_path / name) for name in ("one", "two"))
        assert one.tokens == two.tokens and one.weights == two.weights and list(two.texts) == ["text.txt"]
        (tmp_path / "two").unlink()
