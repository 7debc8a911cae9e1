"""The code of a notebook, run cell after cell as a reader runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def code_cells(path: Path) -> list[str]:
    """The code cells of a notebook, in their order."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_notebook(path: Path) -> dict[str, Any]:
    """Run all code cells in one namespace and return it."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, code in enumerate(code_cells(path)):
        exec(compile(code, f"{path.name}, code cell {number}", "exec"), namespace)
    return namespace
