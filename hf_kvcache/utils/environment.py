"""The machine and the versions with which a measurement was made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("hf-kvcache", "torch", "transformers", "numpy", "lm-eval", "hqq", "optimum-quanto")


def machine(device: str = "cpu") -> dict[str, Any]:
    """The processor, its last-level cache, the threads of torch, and the GPU if one is used."""
    found = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache(),
        "system": platform.system(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {})


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a measurement depends on, where they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        if (version := package_version(package)) is not None:
            found[package] = version
    return found


def package_version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name, or the architecture where the system does not name the processor."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def last_level_cache() -> int | None:
    """Bytes of the largest cache of the first core; None where the system does not say."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(sizes, default=None)
