"""Every operation on a GPU against float64 over what the pages hold; a few cases on the CPU by the reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import cases as of_gpu
from benchmarks.gpu.cases import Case, cases
from benchmarks.gpu.settings import Settings, backend, poisoned

ROOT = Path(__file__).parents[2]
ON_GPU = Settings(torch.device("cuda"))
HERE = Settings(torch.device("cpu"), tiny=True)
#: Triton kernels that a step may launch, torch operators, and uploads from the host; one layer of 32/8/128, bfloat16,
#: 1,024 tokens. They are what the package does today: they may fall, not rise.
BUDGET = {
    "none": {"prompt": (1, 7, 0), "step": (2, 0, 0), "page event": (3, 2, 0), "step after it": (2, 0, 1)},
    "rotated8": {"prompt": (1, 7, 0), "step": (2, 0, 0), "page event": (3, 2, 0), "step after it": (2, 0, 1)},
    "unbiased4": {"prompt": (3, 8, 0), "step": (2, 0, 0), "page event": (3, 2, 0), "step after it": (2, 0, 1)},
}


@pytest.mark.cuda
@pytest.mark.parametrize("case", cases(ON_GPU), ids=lambda case: case.name)
def test_on_a_gpu(case: Case) -> None:
    with poisoned(ON_GPU):
        assert case.problems(case.run()) == []


@pytest.mark.parametrize(
    "part", ["window=300", "ragged=True", "sinks=True", "column_sums", "latent", "hadamard", "pack"]
)
def test_the_cases_themselves(part: str) -> None:
    """The reference gives what the cases expect."""
    with backend("reference"):
        found = [case for case in cases(HERE) if part in case.name][::6]
        assert found and [case.problems(case.run()) for case in found] == [[]] * len(found)


def test_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in cases(HERE) if "fp32" in case.name)
    right = of_gpu.attend

    def wrong(*call):
        result = right(*call)
        return result._replace(output=result.output * 1.01, log_sum_exp=result.log_sum_exp + 1)

    monkeypatch.setattr(of_gpu, "attend", wrong)
    assert len(case.problems(case.run())) == 2
    numbers = iter((1.0, torch.nan))
    monkeypatch.setattr(of_gpu, "attend", lambda *call: (r := right(*call))._replace(output=r.output * next(numbers)))
    assert case.problems(case.run()) == ["a second call gave other bits"]


def test_a_call_left_to_the_reference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with backend("reference"), pytest.raises(AssertionError, match="left to the reference"):
        cases(HERE)[0].run()


def pretended(*arguments: str) -> str:
    """The output of the pretended GPU, in a process of its own."""
    pytest.importorskip("triton", exc_type=ImportError)
    command = [sys.executable, "-m", "benchmarks.gpu.pretended", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_launches_of_a_step_of_a_page_event_and_of_a_prompt() -> None:
    """The launch code of the package on a pretended H100 stays within what it needs today; a plain step never waits."""
    counted = json.loads(pretended("--uncompiled", "--codecs", *BUDGET).splitlines()[-1])
    for codec, moments in BUDGET.items():
        for moment, budget in moments.items():
            found = tuple(counted[codec][moment][what] for what in ("kernels", "operators", "uploads"))
            assert all(n <= most for n, most in zip(found, budget, strict=True)), (codec, moment, found, budget)
        assert counted[codec]["step"]["readbacks"] == counted[codec]["step"]["waits"] == 0, codec


@pytest.mark.slow
def test_every_operation_compiles_as_it_is_launched() -> None:
    """The launches of an operation, of the default codecs among them, compiled for sm_90: they run and do not spill."""
    names = [
        "attend unbiased4 bf16 dim=64",
        "attend rotated8 bf16",
        "attend none bf16 slots=430 queries=300 positions=True",
    ]
    names += ["column_sums rotated8 bf16 .*", "latent_attend rotated8.None bf16 heads=16 queries=1", "hadamard bf16 .*"]
    assert " 0 failures" in pretended("--cases", *(f"^{name}$" for name in (*names, "pack fp32 int4 64")))
