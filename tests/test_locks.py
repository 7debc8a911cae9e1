"""The lock files match the table of tested versions, and can be installed from any index."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "requirements"
PIN = re.compile(r"[a-z0-9-]+==[0-9a-z.]+( ; .+)?")


def lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if not line.startswith("#")]


def pinned(package: str, path: Path = FOLDER / "lock.txt") -> list[str]:
    found = [line.split(" ")[0].partition("==") for line in lines(path)]
    return [version for name, _, version in found if name == package]


def versions(package: str) -> list[str]:
    table = re.search(r"^tested = .*", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert table is not None
    found = re.search(rf"{package} = \[(.*?)\]", table[0])
    assert found is not None
    return re.findall(r'"(.*?)"', found[1])


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.name)
def test_every_line_is_a_pin_and_nothing_else(path: Path) -> None:
    assert [line for line in lines(path) if not PIN.fullmatch(line)] == []


def test_locked_versions_were_tested() -> None:
    assert pinned("torch") == [versions("torch")[-1]]
    assert set(pinned("transformers")) <= set(versions("transformers"))
    assert versions("transformers")[-1] in pinned("transformers")


def test_every_tested_release_is_locked_here_or_in_a_file_of_its_own() -> None:
    others = {path.name: pinned("transformers", path) for path in FOLDER.glob("transformers-*.txt")}
    own = set(versions("transformers")) - set(pinned("transformers"))
    assert others == {f"transformers-{release}.txt": [release] for release in own}


def test_libraries_of_torch_are_not_locked() -> None:
    assert [line for line in lines(FOLDER / "lock.txt") if line.startswith(("nvidia", "cuda"))] == []


def test_kernels_are_compared_with_what_this_triton_and_the_oldest_compiled() -> None:
    with (ROOT / "benchmarks" / "compiled.csv").open(encoding="utf-8", newline="") as file:
        recorded = {row["triton"] for row in csv.DictReader(file)}
    oldest = re.findall(r'"triton>=([\d.]+);', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert len(set(oldest)) == 1
    assert f"{oldest[0]}.0" in recorded and recorded & set(pinned("triton"))
    assert recorded <= {*pinned("triton"), f"{oldest[0]}.0"}
