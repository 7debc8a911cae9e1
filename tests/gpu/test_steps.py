"""The steps of the check at tiny sizes on the CPU, the limits they run under, and what is written of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import environment, layer, measuring, model, session, summary, synchronization
from benchmarks.gpu.results import FAILED, LEFT_OUT, Results, read
from benchmarks.gpu.session import STOPPED, Session
from benchmarks.gpu.settings import Settings

ROOT = Path(__file__).parents[2]


def tiny(out: Path, seconds: float = 1e9) -> Settings:
    return Settings(torch.device("cpu"), tiny=True, out=out, seconds=seconds)


def results(out: Path, step: str) -> Results:
    return Results(out / f"{step}.csv", step)


def test_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "TINY_POINTS", [(256, 1)])
    layer.run(tiny(tmp_path), results(tmp_path, "layer"))
    found = read(tmp_path / "layer.csv")
    assert not [case for case, figures in found.items() if FAILED in figures]
    assert {case for case, figures in found.items() if LEFT_OUT in figures} <= {
        f"T=256 B=1 Hq=4 {name}" for name in ("hqq 4-bit", "quanto 4-bit", "fp8 QuantizedCache")
    }
    errors = {name: found[f"T=256 B=1 Hq=4 {name}"]["error"] for name in ("DynamicCache", "ours none", "ours 4 bits")}
    assert errors["DynamicCache"] < 1e-5 and errors["ours none"] < 1e-5 and 0.01 < errors["ours 4 bits"] < 0.2
    for part in ("latents", "MLA step", "packing", "chunk", "page event"):
        assert any(case.startswith(part) for case in found), part
    assert found["MLA step T=256 H=4 ours none"]["error"] < 1e-5
    lines = summary.measured(found)
    assert len(lines) < len(found) and not any("Hq=8" in line for line in lines)


def test_model(tmp_path: Path) -> None:
    model.run(tiny(tmp_path), results(tmp_path, "model"))
    found = read(tmp_path / "model.csv")
    assert not [case for case, figures in found.items() if FAILED in figures]
    assert len(found) == len(model.METHODS) * 2 + 1 and found["T=256 DynamicCache"]["times dynamic"] == 1


def test_nothing_begins_without_time(tmp_path: Path) -> None:
    model.run(tiny(tmp_path, 0), results(tmp_path, "model"))
    assert all(LEFT_OUT in figures for figures in read(tmp_path / "model.csv").values())


def test_a_failure_costs_its_case(tmp_path: Path) -> None:
    def broken() -> None:
        raise RuntimeError("no such\ninstruction")

    measuring.attempt(tiny(tmp_path), found := results(tmp_path, "layer"), "a, b", broken)
    found.add("c", "", seconds=1.5, right=True, none=None)
    assert read(tmp_path / "layer.csv") == {
        "a, b": {FAILED: "RuntimeError: no such instruction"},
        "c": {"seconds": 1.5, "right": True},
    }


def test_the_file_of_a_card(tmp_path: Path) -> None:
    """It has the card and the versions, and no details; a failure is seen."""
    results(tmp_path, "environment").add("machine", "", **environment.machine(tiny(tmp_path)) | {"card": "NVIDIA X-1"})
    results(tmp_path, "correctness").add("attend fp32", "", relative_error=1e-5, largest_error=1.0, right=True)
    said: list[str] = []
    assert not summary.write(tmp_path, said.append)
    found = read(tmp_path / "gpu_nvidia_x_1.csv")
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["decode"]
    assert found["attend fp32"] == {"relative error": 1e-5, "right": True}
    assert any("1 right, 0 wrong" in line for line in said)
    results(tmp_path, "layer").add("T=1", "", **{FAILED: "why"})
    assert summary.write(tmp_path, said.append)


def a_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    made = Session(command.arguments(["--device", "cpu", "--out", str(tmp_path)]))
    made.environment = dict(os.environ)
    monkeypatch.setattr(session, "_GRACE", 0.1)
    return made


def test_a_process_is_stopped_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, said = a_session(tmp_path, monkeypatch), []
    begin = time.monotonic()
    sleeping = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"]
    assert made.execute(sleeping, 2, said.append) == STOPPED and made.failed
    assert said == ["here"] and time.monotonic() - begin < 20
    assert made.execute(sleeping, 0.1, said.append) is None


def test_a_worker_goes_on_after_a_case_that_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, mark = a_session(tmp_path, monkeypatch), tmp_path / "mark"
    program = f"import os, pathlib; p = pathlib.Path({str(mark)!r}); p.open('a').write('x'); print('noise')\n"
    program += "os._exit(3 if p.stat().st_size < 3 else 0)"
    monkeypatch.setattr(made, "command", lambda *_: [sys.executable, "-c", program])
    said: Counter[str] = Counter()
    made.worker(0, 1, tmp_path / "part.csv", 60, said)
    assert mark.read_text() == "xxx" and said == {"noise": 3}


def test_a_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2 and "no CUDA GPU" in capsys.readouterr().out


def check(tmp_path: Path, **variables: str) -> str:
    """The output of check.sh as a dry run."""
    settings = {"GC_DEVICE": "cpu", "GC_TINY": "1", "GC_WORKERS": "1", "OUT": str(tmp_path), "PYTHON": sys.executable}
    variables = os.environ | settings | variables
    done = subprocess.run(["bash", "benchmarks/gpu/check.sh"], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    """All steps but the package's own tests, as someone with a GPU calls them."""
    output = check(tmp_path, GC_STEPS="a b c d e")
    assert "0 wrong, 0 not reached" in output and "34 of 34 checks right" in output
    count = len(synchronization.checks(tiny(tmp_path)))
    assert f"{count} of {count} plain steps do not wait" in output
    assert len(list(tmp_path.iterdir())) <= 9


@pytest.mark.slow
def test_dry_run_of_the_kernels(tmp_path: Path) -> None:
    """A few cases with the Triton kernels, in the interpreter."""
    pytest.importorskip("triton", exc_type=ImportError)
    for only, count in (("fp32 heads=2 group=3", 6), ("hadamard fp32", 6), ("latent_attend none+None fp32", 1)):
        output = check(tmp_path, GC_STEPS="a b", GC_TRITON="1", GC_ONLY=only)
        assert f"{count} right, 0 wrong, 0 not reached" in output and "decode triton" in output
