"""Plain ``lm_eval --model hf-kvcache``: the .pth file in a scratch folder of packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hf_kvcache_eval import lm_plugin

_FOUND = """
import site, sys
site.addsitedir({site!r})
assert "lm_eval" not in sys.modules and "torch" not in sys.modules, "the hook imports nothing"
import lm_eval.models
from lm_eval.api.registry import model_registry
print("hf-kvcache" in model_registry, "hf_kvcache_eval.lm" in sys.modules)
"""


def run(code: str, *options: str) -> str:
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True).stdout


def test_installed_it_is_found_and_uninstalled_it_is_not(tmp_path: Path) -> None:
    code = _FOUND.format(site=str(tmp_path))
    assert "installed" in lm_plugin.install(str(tmp_path))
    lm_plugin.install(str(tmp_path))
    assert run(code).split() == ["True", "False"]
    code_model = "from lm_eval.api.registry import get_model; print(get_model('hf-kvcache').__name__)"
    assert run(code + code_model).split()[-1] == "KVCacheLM"
    assert "removed" in lm_plugin.uninstall(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert "not installed" in lm_plugin.uninstall(str(tmp_path))
    assert run(code).split() == ["False", "False"]


def test_it_outlives_the_package_in_silence(tmp_path: Path) -> None:
    """After `pip uninstall` the line that is left behind does nothing and says nothing."""
    lm_plugin.install(str(tmp_path))
    code = f"import site; site.addsitedir({str(tmp_path)!r}); print('fine')"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("fine\n", "")


def test_starting_python_with_it_imports_nothing_but_the_plugin(tmp_path: Path) -> None:
    lm_plugin.install(str(tmp_path))
    code = f"""
import site, sys
before = set(sys.modules)
site.addsitedir({str(tmp_path)!r})
print(*sorted(set(sys.modules) - before))
"""
    extra = set(run(code).split()) - {"hf_kvcache_eval", "hf_kvcache_eval.lm_plugin"}
    assert extra <= {
        "__future__",
        "importlib",
        "importlib._bootstrap",
        "importlib._bootstrap_external",
        "importlib.machinery",
        "warnings",
    }
