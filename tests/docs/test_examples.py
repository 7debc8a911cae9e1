"""The programs in examples/ run as they are, each by `python examples/<name>.py`, from another folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_kvcache.integration.versions import CACHE_ARGUMENT
from tests.docs.snippets import ROOT

pytestmark = pytest.mark.skipif(
    CACHE_ARGUMENT != "cache", reason="the examples are written for transformers from 5.24 on"
)

#: Programs that load no model, with arguments that make them short.
FAST = {"mla": ["--prompt-tokens", "48"]}
#: Those that load the default model.
SLOW = {
    "calibrate_latent": [],
    "chat_restart": [],
    "document_questions": [],
    "endless": ["40"],
    "heavy_hitters": [],
    "longer_than_memory": ["6144"],
    "quickstart": [],
    "reusable_context": [],
    "shared_prefix": [],
    "shared_prefix_batch": [],
}
#: Those that need data as well.
WITH_DATA = {"lm_eval_comparison"}


def output_of(name: str, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval"), *sys.path])}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    answer = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_every_example_is_named_here() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == FAST.keys() | SLOW.keys() | WITH_DATA


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_import_nothing_of_the_tests(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.search(r"^\s*(from|import) tests\b", text, re.MULTILINE) is None
    assert f"python examples/{path.name}" in text, "its docstring says how to run it"


@pytest.mark.parametrize("name", FAST)
def test_fast_example(name: str, tmp_path: Path) -> None:
    assert output_of(name, tmp_path, *FAST[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_slow_example(name: str, tmp_path: Path) -> None:
    assert output_of(name, tmp_path, *SLOW[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WITH_DATA))
def test_example_with_data(name: str, tmp_path: Path) -> None:
    data = os.environ.get("HF_KVCACHE_EVAL_DATA")
    if data is None:
        pytest.skip("HF_KVCACHE_EVAL_DATA names no folder")
    assert "accuracy" in output_of(name, tmp_path, data)
