"""What a step over latents and a chunk of queries ask of a GPU, on the pretended one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Triton kernels, torch operators, and uploads from the host. They are what the package does today: they may fall, not
#: rise. A step is a projection, attention, a merge and a matrix product. A chunk rotates its queries, attends to pages
#: and to its own tokens, and merges both.
BUDGET = {f"latents {bits}": (3, 1, 0) for bits in (None, 8, 4)} | {
    f"chunk {codec}": (4, 2, 0) for codec in ("unbiased4", "rotated8")
}


@pytest.mark.slow
def test_launches_of_a_step_over_latents_and_of_a_chunk() -> None:
    pytest.importorskip("triton", exc_type=ImportError)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval")])}
    command = [sys.executable, "-m", "benchmarks.gpu.pretended_parts"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    assert counted.pop("spilling") == [] and counted.keys() == BUDGET.keys()
    for part, budget in BUDGET.items():
        found = tuple(counted[part][what] for what in ("kernels", "operators", "uploads"))
        assert all(n <= most for n, most in zip(found, budget, strict=True)), (part, found, budget)
