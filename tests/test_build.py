"""What is compiled, how a wheel is named, and that it works without a compiler."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

from hf_kvcache.kernels.cpu import build, library
from tests.kernels.emulated import run

ROOT = Path(__file__).parent.parent
DUMP = 'if [ "$1" = -dumpmachine ]; then echo {target}; exit; fi\n'
#: The last argument of both a compilation and a link is the output.
WRITE = 'for output; do :; done\ncat "{library}" > "$output"\n'


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler for ARM that does not know I8MM; it writes down its arguments and compiles nothing."""
    script = tmp_path / "cxx"
    unknown = 'case "$*" in *i8mm*) exit 1;; esac\n'
    written = f'echo "$*" >> {tmp_path}/calls\n'
    text = DUMP.format(target="aarch64-linux-gnu") + unknown + written + WRITE.format(library="/dev/null")
    _write_script(script, text)
    monkeypatch.setenv("CXX", str(script))
    return tmp_path


def _write_script(path: Path, text: str) -> None:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_compiled_for_the_target_of_the_compiler_as_far_as_it_knows_it(compiler: Path) -> None:
    build.build(compiler / "library.so")
    units = re.findall(r"src/(\w+)\.cpp", (compiler / "calls").read_text())
    assert sorted(units) == ["dispatch", "kernels_dotprod", "kernels_portable"]
    dispatch = next(line for line in (compiler / "calls").read_text().splitlines() if "dispatch.cpp" in line)
    assert re.findall(r"-DHFKV_\w+", dispatch) == ["-DHFKV_WITH_DOTPROD"]
    assert (compiler / "library.so").exists()


def test_each_set_of_instructions_has_a_unit_and_a_name() -> None:
    units = {path.stem.partition("_")[2] for path in build.SOURCES.glob("kernels_*.cpp")}
    assert units == {"portable", *build._X86, *build._ARM}
    dispatched = (build.SOURCES / "dispatch.cpp").read_text()
    assert units == set(re.findall(r"HFKV_KERNELS\((\w+)\)}", dispatched))


def test_every_function_is_emulated() -> None:
    names = [name.removeprefix("*") for name in run.functions()]
    used = set(re.findall(r"hfkv_\w+", Path(library.__file__).read_text()))
    assert used <= set(names) and len(names) == len(set(names))


@pytest.mark.parametrize(
    ("system", "python", "machine", "target", "tag"),
    [
        ("linux", "linux-x86_64", "x86_64", None, "linux_x86_64"),
        ("linux", "linux-aarch64", "aarch64", None, "linux_aarch64"),
        ("darwin", "macosx-10.9-universal2", "arm64", None, "macosx_11_0_arm64"),
        ("darwin", "macosx-14.4-arm64", "arm64", None, "macosx_14_0_arm64"),
        ("darwin", "macosx-14.4-arm64", "arm64", "12.3", "macosx_12_0_arm64"),
        ("darwin", "macosx-10.13-universal2", "x86_64", None, "macosx_10_13_x86_64"),
    ],
)
def test_tag_of_a_wheel(
    system: str, python: str, machine: str, target: str | None, tag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(sysconfig, "get_platform", lambda: python)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.delenv("MACOSX_DEPLOYMENT_TARGET", raising=False)
    if target:
        monkeypatch.setenv("MACOSX_DEPLOYMENT_TARGET", target)
    assert _hook().platform_tag() == tag


def _hook() -> ModuleType:
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _installed(folder: Path, environment: dict[str, str]) -> tuple[str, Path]:
    """Build a wheel from a copy of the sources and install it; returns its name and where it was installed."""
    pytest.importorskip("hatchling")
    source = folder / "source"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for name in ("hf_kvcache", "eval", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    common = ["--no-deps", "--no-index"]
    wheels = ["wheel", *common, "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run([*pip, *wheels], env=environment, check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", *common, "--target", folder / "installed", wheel], env=environment, check=True)
    return wheel.name, folder / "installed"


def _without_compilers(folder: Path) -> dict[str, str]:
    """An environment with the basic tools on the PATH and no compiler."""
    tools = folder / "tools"
    tools.mkdir()
    for name in ("sh", "cat", "uname"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    names = ("CXX", library.VARIABLE, "HF_KVCACHE_BUILD", "HF_KVCACHE_BACKEND", "HF_KVCACHE_EMULATOR")
    return {key: value for key, value in os.environ.items() if key not in names} | {"PATH": str(tools)}


REPORT = """
import torch
from hf_kvcache.kernels import dispatch
from hf_kvcache.kernels.cpu import library
print(library.__file__)
for op in ("decode", "extend", "latent_decode", "decode"):
    found = dispatch.implementation(op, torch.device("cpu"))
print(dispatch.implementation("decode", torch.device("cpu")) and library.isa())
"""


def _run_report(installed: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment = environment | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", REPORT]
    result = subprocess.run(command, env=environment, cwd=installed, capture_output=True, text=True, check=True)
    assert result.stdout.startswith(str(installed)), "another installation was tested"
    return result


@pytest.mark.slow
def test_a_wheel_needs_no_compiler(tmp_path: Path) -> None:
    """A wheel with this installation's library: a stand-in for the compiler copies it."""
    if library.reason_missing() is not None:
        pytest.skip("the library was not built")
    environment = _without_compilers(tmp_path)
    script = tmp_path / "cxx"
    text = DUMP.format(target=f"{platform.machine()}-linux-gnu") + WRITE.format(library=build.LIBRARY)
    _write_script(script, text)
    name, installed = _installed(tmp_path, environment | {"CXX": str(script)})
    assert name.endswith(f"-py3-none-{_hook().platform_tag()}.whl")
    result = _run_report(installed, environment)
    assert result.stdout.split()[-1] in library.available_isas() and "kernels" not in result.stderr


@pytest.mark.slow
def test_without_a_compiler_the_reference_runs_and_says_so_once(tmp_path: Path) -> None:
    environment = _without_compilers(tmp_path)
    name, installed = _installed(tmp_path, environment)
    assert name.endswith("-py3-none-any.whl")
    result = _run_report(installed, environment)
    assert result.stdout.split()[-1] == "None"
    assert result.stderr.count("no native kernels (libhf_kvcache") == 1
