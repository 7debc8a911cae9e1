"""What the tests of lm-eval's tasks share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["no task of lm-eval", pytest.param("all tasks of lm-eval", marks=pytest.mark.slow)])
def task_index(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """lm-eval's own tasks are thousands of files, and to look for a name in them takes longer than all else."""
    if request.param == "no task of lm-eval":
        (tmp_path / "tasks").mkdir()
        monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "tasks" / "manager.py"))
