"""The notebook runs from its first to its last cell, on a tiny model and on the default one, and shows what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kvcache.cli.models import default_model_folder
from hf_kvcache.integration.versions import CACHE_ARGUMENT
from tests.docs.notebooks import run_notebook
from tests.docs.snippets import ROOT
from tests.docs.tiny_folder import write_tiny_model

pytestmark = pytest.mark.skipif(CACHE_ARGUMENT != "cache", reason="it is written for transformers from 5.24 on")

TOUR = ROOT / "examples" / "tour.ipynb"


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What the notebook sets for its process, gradients and figures, is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    with torch.enable_grad():
        yield
    pyplot.close("all")


def test_file() -> None:
    """It is in version control without outputs, and each cell has an id, as the format asks."""
    notebook = json.loads(TOUR.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert "hf_kvcache.cli" not in TOUR.read_text(encoding="utf-8")


@pytest.mark.slow
def test_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", str(write_tiny_model(tmp_path / "model")))
    found = run_notebook(TOUR)
    assert sorted(found["kl_of_bits"]) == found["kl_of_bits"], "fewer bits differ more"
    assert sorted(found["bytes_of_bits"], reverse=True) == found["bytes_of_bits"]


@pytest.mark.slow
def test_on_the_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer bits and fewer tokens cost more, and only the window loses the needle."""
    monkeypatch.setenv("MODEL", str(default_model_folder()))
    found: dict[str, Any] = run_notebook(TOUR)
    assert found["formula"] == found["held"]
    assert sorted(found["kl_of_bits"]) == found["kl_of_bits"]
    for divergences in found["kl_of_policy"].values():
        assert sorted(divergences) == divergences
    with_needle = {name for name, answer in found["answers"].items() if "48213" in answer}
    assert with_needle == found["answers"].keys() - {"a window of a third"}
