"""The choice of a backend, the warning when it cannot run, and libraries that cannot be loaded."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hf_kvcache.kernels import dispatch
from hf_kvcache.kernels.attention import attend
from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.inputs import DenseTokens, Scoring
from hf_kvcache.kernels.visibility import Visibility

CPU = torch.device("cpu")
# A device that need not be there: dispatch looks at its type alone.
ELSEWHERE = torch.device("xpu")
BUILT = pytest.mark.skipif(library.reason_missing() is not None, reason="the native library was not built")


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No backend is forced, and no choice or warning of other tests is remembered."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    for cached in (dispatch._implementation, dispatch._warn):
        cached.cache_clear()
    yield
    for cached in (dispatch._implementation, dispatch._warn):
        cached.cache_clear()


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> str:
    """A package without the compiled library; gives the reason."""
    reason = "it was not built for this test"
    monkeypatch.setattr(library, "reason_missing", lambda: reason)
    return reason


def name_of(op: str, device: torch.device = CPU) -> str | None:
    """The name of the module that dispatch gives."""
    module = dispatch.implementation(op, device)
    return None if module is None else module.__name__


@BUILT
def test_native_on_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    """The CPU has native kernels for some operations and the reference for the others, without a warning."""
    assert name_of("decode") == "hf_kvcache.kernels.cpu.decode"
    assert name_of("pack") == "hf_kvcache.kernels.cpu.pack"
    for op in set(dispatch.OPERATIONS["triton"]) - set(dispatch.OPERATIONS["native"]):
        assert name_of(op) is None
    assert not caplog.records


@pytest.mark.parametrize("op", [*dispatch.OPERATIONS["triton"], "an unknown operation"])
@pytest.mark.parametrize("device", [CPU, ELSEWHERE], ids=str)
def test_reference(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, op: str, device: torch.device
) -> None:
    """The reference can be forced on any device, and an unknown operation runs in the reference."""
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert name_of(op, device) is None
    assert not caplog.records


@pytest.mark.parametrize("value", ["cuda", "Native", "reference ", "0"])
def test_unknown_backend(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """The message names the variable, the value and what is accepted, every time."""
    monkeypatch.setenv(dispatch.VARIABLE, value)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"HF_KVCACHE_BACKEND={value!r}; accepted: reference, triton, native"):
            dispatch.implementation("decode", CPU)


def test_empty_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable forces nothing."""
    expected = name_of("decode")
    monkeypatch.setenv(dispatch.VARIABLE, "")
    assert name_of("decode") == expected


def test_triton_that_cannot_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """On a CPU without the interpreter, the reference replaces triton, with one warning for all calls."""
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for op in (*dispatch.OPERATIONS["triton"], "decode"):
        assert name_of(op) is None
    assert messages(caplog) == [
        "hf_kvcache: no triton kernels (triton runs on a CPU only with TRITON_INTERPRET=1); "
        "the slower reference in torch is used"
    ]


def test_native_for_another_device(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The native kernels are for the CPU alone."""
    monkeypatch.setenv(dispatch.VARIABLE, "native")
    assert name_of("decode", ELSEWHERE) is None and name_of("pack", ELSEWHERE) is None
    assert len(messages(caplog)) == 1 and "native kernels are for the CPU, not xpu" in messages(caplog)[0]


def test_nothing_is_computed_on_the_meta_device(caplog: pytest.LogCaptureFixture) -> None:
    """Plans run there; no kernels are missed."""
    assert name_of("decode", torch.device("meta")) is None and not messages(caplog)


@pytest.mark.parametrize("forced", ["", "native"])
def test_library_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, no_library: str, forced: str
) -> None:
    """Without the library there is one warning, whether native was asked for by name or not."""
    monkeypatch.setenv(dispatch.VARIABLE, forced)
    assert [name_of(op) for op in ("decode", "pack", "decode")] == [None, None, None]
    assert len(messages(caplog)) == 1 and f"no native kernels ({no_library})" in messages(caplog)[0]


@BUILT
def test_each_value_is_remembered_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of the variable takes effect at the next call, and the earlier choice is remembered."""
    native = dispatch.implementation("decode", CPU)
    assert native is not None
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert dispatch.implementation("decode", CPU) is None
    monkeypatch.setenv(dispatch.VARIABLE, "native")
    assert dispatch.implementation("decode", CPU) is native
    monkeypatch.delenv(dispatch.VARIABLE)
    monkeypatch.setattr(library, "reason_missing", lambda: pytest.fail("asked again"))
    assert dispatch.implementation("decode", CPU) is native


# The files are tried one after the other in one process, as after a fresh start: importing takes longest.
SCRIPT = """
import logging, os, sys, torch
logging.basicConfig(format="%(message)s")
from hf_kvcache.kernels.attention import attend
from hf_kvcache.kernels.reference import decode as reference
from hf_kvcache.kernels.inputs import DenseTokens, Scoring
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.kernels import dispatch
from hf_kvcache.kernels.cpu import library
query, keys, values = (torch.ones(1, 1, 1, 8) for _ in range(3))
call = query, None, DenseTokens(keys, values), Visibility(0, 1, None, 0, True, None), Scoring(1.0)
for os.environ[library.VARIABLE] in sys.argv[1:]:
    for cached in (library._load, dispatch._implementation, dispatch._warn):
        cached.cache_clear()
    for _ in range(2):
        assert torch.equal(attend(*call).output, reference.attend(*call).output)
    print(dispatch.implementation("decode", torch.device("cpu")), dispatch.implementation("pack", torch.device("cpu")))
"""


def test_bad_libraries(tmp_path: Path) -> None:
    """With a file that is missing, is no library or is another library, the reference runs, with one warning."""
    (tmp_path / "empty.so").touch()
    (tmp_path / "text.so").write_text("not a library")
    another = Path(torch._C.__file__)
    paths = [tmp_path / "missing.so", tmp_path / "empty.so", tmp_path / "text.so", tmp_path, another]
    finished = run_with_libraries(paths)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == ["None"] * 2 * len(paths)
    warnings = [line for line in finished.stderr.splitlines() if line.startswith("hf_kvcache:")]
    assert len(warnings) == len(paths)
    for path, warning in zip(paths, warnings, strict=True):
        assert "no native kernels" in warning and path.name in warning


def run_with_libraries(paths: list[Path]) -> subprocess.CompletedProcess[str]:
    """Attention in a process of its own, which loads each of these files as the library."""
    environment = {name: value for name, value in os.environ.items() if name != dispatch.VARIABLE}
    command = [sys.executable, "-c", SCRIPT, *map(str, paths)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings."""
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_gradient_is_an_error(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels have no gradient: asking for one raises an error, where autograd would give zeros."""
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    query = torch.ones(1, 1, 1, 8, requires_grad=True)
    dense = DenseTokens(torch.ones(1, 1, 3, 8), torch.ones(1, 1, 3, 8))
    output = attend(query, None, dense, Visibility(2, 1, None, 0, True, None), Scoring(1.0)).output
    with pytest.raises(RuntimeError, match="no gradient"):
        output.sum().backward()
