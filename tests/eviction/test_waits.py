"""How often an eviction and a plain step wait for the device: found on a pretended one, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.eviction.toys import reading_once

ROOT = Path(__file__).parents[2]
#: What one layer may ask for, without its attention kernels: waits for the device, uploads that do not wait, operators.
#: The scale of keys counts as the operators of the reference. A policy that accumulates attention adds it up at every
#: step, where no kernel does.
BUDGET = {"prompt": (1, 5, 480), "step": (0, 0, 5), "eviction": (1, 10, 520)}
ADDING_UP = 11


def counted(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu.waits", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def check(found: dict[str, Any]) -> None:
    """Every count is within the budget, and the device keeps the tokens that the CPU keeps."""
    assert found
    for name, counts in found.items():
        assert counts["same"], name
        moments = set(BUDGET) - ({"eviction"} if name.startswith("keepall") else set())
        for moment in moments:
            waits, uploads, operators = BUDGET[moment]
            if moment == "step" and "h2o" in name:
                operators = ADDING_UP
            asked = tuple(counts[moment][what] for what in ("waits", "uploads", "operators"))
            within = all(n <= most for n, most in zip(asked, (waits, uploads, operators), strict=True))
            assert within, (name, moment, asked, counts[moment])


#: A gate belongs to one model, which the benchmark does not have.
POLICIES = [name for name in reading_once() if name != "gate"]


def test_an_eviction_waits_once_and_a_plain_step_never() -> None:
    check(counted("--codecs", "unbiased4", "--padded", "no", "--policies", "snapkv", "h2o", "ada-expected"))


@pytest.mark.slow
def test_waits_of_every_policy() -> None:
    check(counted("--padded", "no", "--policies", *POLICIES))


@pytest.mark.slow
def test_padded_sequences_wait_together() -> None:
    """They are looked at one by one, and yet one read-back serves all of them."""
    found = counted("--padded", "yes", "--policies", *(name for name in POLICIES if name != "keepall"))
    for name, counts in found.items():
        assert counts["same"] and [counts[at]["waits"] for at in ("prompt", "step", "eviction")] == [1, 0, 1], name
