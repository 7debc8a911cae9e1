"""The library and its calibration need none of the packages of the extras; the demo says which it needs."""

from __future__ import annotations

import subprocess
import sys

_SCRIPT = """
import sys
from importlib.machinery import PathFinder

MISSING = {"accelerate", "gguf", "rich", "datasets", "lm_eval", "matplotlib", "triton"}
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] in MISSING else find(name, *rest))

import hf_kvcache
from hf_kvcache.cli import main as cli
from hf_kvcache.cli import models
from hf_kvcache.lowrank import moment_collection

with models._status("waiting"), moment_collection.progress_bar(8) as advance:
    advance(8)
    print("waited")
assert not MISSING & {name.split(".")[0] for name, module in sys.modules.items() if module is not None}
sys.exit(cli.main(["demo"]))
"""


def test_what_only_the_extras_have_is_not_needed() -> None:
    said = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True)
    assert said.stdout.splitlines() == ["waited"], said.stderr
    assert said.returncode == 1
    assert "the demo needs the package rich; install it with: pip install accelerate gguf rich" in said.stderr
