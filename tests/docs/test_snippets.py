"""The Python code in README.md, CONTRIBUTING.md and docs/ runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvcache.cli.models import load_default_model
from hf_kvcache.integration.versions import CACHE_ARGUMENT
from tests.docs.snippets import PAGES, ROOT, prepared, run, run_with_tiny_models, snippets

pytestmark = pytest.mark.skipif(CACHE_ARGUMENT != "cache", reason="the pages are written for transformers from 5.24 on")

WITH_CODE = [page for page in PAGES if any(snippet.mark is None for snippet in snippets(page))]
WITH_REAL_MODEL = [page for page in PAGES if any(snippet.mark == "slow" for snippet in snippets(page))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_of_a_page(page: Path) -> None:
    """Every block runs behind those before it, with a tiny random model."""
    if "@register(" not in page.read_text(encoding="utf-8"):
        run_with_tiny_models(page)
        return
    # What a page registers must not be there for other tests.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval"), *sys.path])}
    command = [sys.executable, "-m", "tests.docs.snippets", str(page)]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_REAL_MODEL, ids=name_of)
def test_code_that_needs_the_real_model(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of such a page run with the default model, whatever model they name."""
    model, tokenizer = load_default_model()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    run(page, (None, "slow"), prepared("the default model"))


def test_blocks_and_marks_are_found(tmp_path: Path) -> None:
    """A block with its mark and its line; other languages are no blocks."""
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\na = 1\n```\n<!-- snippet: slow -->\n```python\nb = 2\n```\n```bash\nls\n```\n")
    assert [(snippet.code, snippet.mark, snippet.line) for snippet in snippets(page)] == [
        ("a = 1\n", None, 4),
        ("b = 2\n", "slow", 8),
    ]
