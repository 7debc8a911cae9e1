"""The programs in examples/ run as they are, from another folder: on a tiny model, and on the default model.

On the tiny model they run inside this process, since a process of its own takes five seconds to import torch.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from hf_kvcache.cli.models import default_model_folder
from hf_kvcache.integration.versions import CACHE_ARGUMENT
from tests.docs.snippets import ROOT
from tests.docs.tiny_folder import write_tiny_model

pytestmark = pytest.mark.skipif(
    CACHE_ARGUMENT != "cache", reason="the examples are written for transformers from 5.24 on"
)

#: Programs, with arguments that make them short.
PROGRAMS: dict[str, list[str]] = {
    "assisted": [],
    "calibrate_latent": [],
    "chat_restart": [],
    "document_questions": [],
    "endless": ["40"],
    "heavy_hitters": [],
    "longer_than_memory": ["6144"],
    "mla": ["--prompt-tokens", "48"],
    "quickstart": [],
    "reusable_context": [],
    "shared_prefix": [],
    "shared_prefix_batch": [],
    "why_cache": ["128"],
}
#: Those that need data and lm-eval as well.
WITH_DATA = {"lm_eval_comparison"}
#: Those that take memory away from their process, and so have one of their own.
LIMITED = {"longer_than_memory"}
#: What a program prints if what it shows has come true.
SAID = {"assisted": "the same text", "heavy_hitters": "kept in the first head", "chat_restart": "not read again"}


def test_every_example_is_named_here() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == PROGRAMS.keys() | WITH_DATA


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_can_be_copied(path: Path) -> None:
    """They import nothing that a user does not have, load models as users do, and say how to run them."""
    text = path.read_text(encoding="utf-8")
    assert re.search(r"^\s*(from|import) (tests|benchmarks|hf_kvcache\.cli)\b", text, re.MULTILINE) is None
    assert "AutoModelForCausalLM.from_pretrained(" in text
    assert f"python examples/{path.name}" in text, "its docstring says how to run it"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_on_a_tiny_model(
    name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every program runs to its end in an empty folder."""
    program = ROOT / "examples" / f"{name}.py"
    if name in LIMITED:
        printed = output_of(name, tmp_path, "1024", model=str(tiny))
        assert printed and SAID.get(name, "") in printed
        return
    monkeypatch.chdir(tmp_path)
    for variable in ("MODEL", "DRAFT"):
        monkeypatch.setenv(variable, str(tiny))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(sys, "argv", [str(program), *PROGRAMS[name]])
    runpy.run_path(str(program), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed and SAID.get(name, "") in printed


def output_of(name: str, folder: Path, *arguments: str, model: str | None = None) -> str:
    """What a program prints on a model, by default the default one, in a process of its own."""
    model = model or str(default_model_folder())
    path = os.pathsep.join([str(ROOT), str(ROOT / "eval"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "MODEL": model, "DRAFT": model}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    answer = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_on_the_default_model(name: str, tmp_path: Path) -> None:
    printed = output_of(name, tmp_path, *PROGRAMS[name])
    assert printed and SAID.get(name, "") in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WITH_DATA))
def test_with_data(name: str, tmp_path: Path) -> None:
    """With the data that HF_KVCACHE_EVAL_DATA names, or four sentences."""
    data = os.environ.get("HF_KVCACHE_EVAL_DATA")
    if data is None:
        story = "lost a shoe in the garden and looked for it the whole day. In the evening she found her shoe"
        rows = [{"text": f"{who} {story}"} for who in ("Ada", "Eve", "Ida", "Mia")]
        file = tmp_path / "data" / "lambada_openai" / "test.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        data = str(tmp_path / "data")
    assert "accuracy" in output_of(name, tmp_path, data)
