"""Python time of a decoding step's launch code stays within its budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
#: CPU time of a layer's step relative to DynamicCache's with sdpa, and the Python functions that it calls. They are
#: what the package needs today: they may fall, not rise. Times are of a Xeon with AMX: 33 us to 49 in a plain step.
#: DynamicCache had tokens in bfloat16 before; the ratio was then 0.25 on an EPYC and 0.8 on this Xeon, where
#: torch takes much less time for the same operators.
BUDGET = {
    "unbiased4": (0.75, 31),
    "rotated8": (0.75, 31),
    "none": (0.75, 31),
    "snapkv": (1.25, 78),
    "h2o": (1.25, 93),
    "latents": (0.7, 79),
    "latents, 4 bits": (0.7, 79),
}
#: Times differ by some percent from run to run, and between processors.
SLACK = 1.3


def measured(*names: str) -> dict[str, Any]:
    """What ``benchmarks.gpu.python_time`` finds, in a process of its own: Triton is patched there."""
    pytest.importorskip("triton", exc_type=ImportError)
    command = [sys.executable, "-m", "benchmarks.gpu.python_time", "--json", "--only", *names]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_python_time_of_a_step() -> None:
    found = measured(*BUDGET)
    again = [name for name, (ratio, _) in BUDGET.items() if found[name]["ratio"] > SLACK * ratio]
    if again:  # a machine may have been busy with something else
        found |= measured(*again)
    for name, (ratio, calls) in BUDGET.items():
        assert found[name]["ratio"] <= SLACK * ratio, (name, found[name])
        assert found[name]["calls"] <= calls, (name, found[name])
