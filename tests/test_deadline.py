"""Tests that do not run before a deadline are named, with one process of pytest and with several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: The deadline passes in the first test.
_TESTS = """
from tests import deadline

def test_first(request):
    request.config.stash[deadline.EXPIRY] = 0.0

def test_late():
    assert False
"""


@pytest.mark.parametrize("workers", [[], ["-p", "xdist", "-n", "1"]], ids=["alone", "xdist"])
def test_tests_that_did_not_run_are_named(tmp_path: Path, workers: list[str]) -> None:
    (tmp_path / "test_two.py").write_text(_TESTS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.deadline",
        "--deadline",
        "1000",
        *workers,
        "test_two.py",
    ]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    said = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "1 tests did not run" in said.stdout
    assert "\ntest_two.py::test_late\n" in said.stdout
    assert "1 passed, 1 skipped" in said.stdout
