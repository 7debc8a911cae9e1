"""Build hook: compiles the CPU kernels when the package is installed or a wheel is made, and adds lm-eval's task
files, the tracked results and the list of tested versions.

Without a compiler, or with ``HF_KVCACHE_BUILD=0``, the installation succeeds all the same and the package uses its
reference kernels in torch, which ``hf-kvcache info`` says.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeKernels(BuildHookInterface):
    """Adds the compiled library to the package."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the files are collected."""
        if version == "standard":  # an editable installation finds them where they are
            build_data["force_include"]["eval/tasks"] = "hf_kvcache_eval/tasks"
            # For `hf-kvcache info` and `hf-kvcache methods`.
            build_data["force_include"]["pyproject.toml"] = "hf_kvcache/cli/data/pyproject.toml"
            for path in (Path(self.root) / "docs" / "evaluation").glob("*.csv"):
                build_data["force_include"][str(path)] = f"hf_kvcache/cli/data/evaluation/{path.name}"
        if os.environ.get("HF_KVCACHE_BUILD") == "0":
            return
        script = Path(self.root) / "hf_kvcache" / "kernels" / "cpu" / "build.py"
        spec = importlib.util.spec_from_file_location("hf_kvcache_native_build", script)
        assert spec is not None and spec.loader is not None
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        system = platform_tag()
        if sys.platform == "darwin":  # the compiler compiles for the same release as the tag says
            os.environ["MACOSX_DEPLOYMENT_TARGET"] = ".".join(system.split("_")[1:3])
        try:
            library = native.build()
        except native.CompilerError as error:
            self.app.display_warning(f"the CPU kernels were not compiled, the package will be slower: {error}")
            return
        build_data["artifacts"].append(str(library.relative_to(self.root)))
        # The library depends on the platform, but neither on Python's nor on torch's binary interface.
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{system}"


def platform_tag() -> str:
    """The platform of the wheel, as its name says it.

    On macOS a Python may be for two processors, but the library is for this one. The oldest release that it runs on is
    ``$MACOSX_DEPLOYMENT_TARGET``, else that of the Python, and at least 11.0 on ARM, whose first release that was.
    """
    system = sysconfig.get_platform()
    if sys.platform != "darwin":
        return system.replace("-", "_").replace(".", "_")
    oldest = os.environ.get("MACOSX_DEPLOYMENT_TARGET") or system.split("-")[1]
    major, minor = (int(part) for part in (*oldest.split("."), "0")[:2])
    machine = platform.machine()
    if machine == "arm64":
        major, minor = max((major, minor), (11, 0))
    # From 11 on, the names of wheels count major releases only.
    return f"macosx_{major}_{0 if major > 10 else minor}_{machine}"
