"""The environment of kvpress, which pins an older transformers than this package works with."""

from __future__ import annotations

import os
import subprocess
import venv
from importlib.metadata import distributions
from pathlib import Path

from hf_kvcache.cli.models import cache_home

#: Environment variable: another folder for the environment.
VARIABLE = "HF_KVCACHE_KVPRESS"
#: torch comes first and alone, so that it is the build that pip's index gives for this machine.
PACKAGES = ("torch==2.13.0", "kvpress==0.5.5")
#: Packages whose versions a result names.
_TOLD = ("kvpress", "transformers", "torch")
_DONE = "-".join(PACKAGES).replace("==", "-")


def folder() -> Path:
    """Where the environment is, or would be: in the user's cache folder unless ``HF_KVCACHE_KVPRESS`` says."""
    return Path(os.environ.get(VARIABLE) or cache_home() / "peers" / "kvpress")


def is_made() -> bool:
    """Whether the environment is there, with the packages of this version."""
    return (folder() / _DONE).is_file()


def make() -> Path:
    """Make the environment, if it is not there: some minutes, about 1.4 GB; returns its folder.

    Raises:
        RuntimeError: if pip cannot install the packages.
    """
    if not is_made():
        venv.create(folder(), with_pip=True)
        for package in PACKAGES:
            if subprocess.run([python(), "-m", "pip", "install", "--quiet", package], check=False).returncode:
                raise RuntimeError(f"pip cannot install {package} into {str(folder())!r}; its message stands above")
        (folder() / _DONE).touch()
    return folder()


def python() -> Path:
    """The environment's Python."""
    return folder() / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def versions() -> dict[str, str]:
    """The versions of what runs in the environment; empty where it is not there."""
    places = [str(path) for path in (*folder().glob("lib/python3*/site-packages"), folder() / "Lib/site-packages")]
    found = {dist.metadata["Name"].lower(): dist.version for dist in distributions(path=places)} if is_made() else {}
    return {name if name == "kvpress" else f"kvpress's {name}": found[name] for name in _TOLD if name in found}
