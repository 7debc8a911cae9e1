"""``hf-kvcache info`` says what is slow on a machine, and what to do."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_kvcache.cli.main import main
from hf_kvcache.cli.slow_here import Here

FAST = Here("", None, True, "avx512-vnni", "x86_64", (9, 0), False, None, "5.24.0", ("5.17.0", "5.9.0", "5.24.0"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"forced": "reference"}, ["HF_KVCACHE_BACKEND=reference", "unset it"]),
        ({"library": "it was not built", "isa": ""}, ["it was not built); reinstall"]),
        ({"library": "x", "isa": "", "compiler": False}, ["install a C++ compiler"]),
        ({"isa": "portable"}, ["no AVX2"]),
        ({"isa": "portable", "machine": "aarch64"}, ["no dot products of bytes"]),
        ({"isa": "portable", "machine": "riscv64"}, ["vector instructions of riscv64"]),
        ({"isa": "neon-dotprod", "machine": "aarch64"}, []),
        ({"isa": "avx2"}, ["no AVX-512 VNNI", "avx2"]),
        ({"isa": "avx512-amx"}, []),
        ({"triton": "triton 3.1.0 is installed"}, ["triton 3.1.0 is installed", "pip install 'triton>=3.6'"]),
        ({"triton": "triton is not installed", "gpu": None}, []),
        ({"gpu": (7, 5)}, ["capability 7.5"]),
        ({"gpu": (7, 5), "hip": True}, []),
        ({"transformers": "5.25.0.dev0"}, ["5.25.0.dev0 is newer than 5.24.0", "pip install transformers==5.24.0"]),
        ({"transformers": "5.18.0"}, []),
        ({"tested": (), "transformers": "9.0"}, []),
    ],
)
def test_each_reason(changes: dict[str, Any], words: list[str]) -> None:
    """A line for what is slow and none for what is not."""
    found = replace(FAST, **changes).reasons()
    assert len(found) == bool(words)
    assert all(word in found[0] for word in words)


def test_info_says_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    listed = re.findall(r'"(5[^"]*)"', re.search(r"transformers = \[(.*?)\]", project)[1])  # type: ignore[index]
    assert list(Here.found().tested) == listed
    monkeypatch.setenv("HF_KVCACHE_BACKEND", "reference")
    assert main(["info"]) == 0
    assert "slow here\n- HF_KVCACHE_BACKEND=reference" in capsys.readouterr().out
