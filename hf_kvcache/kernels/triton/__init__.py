"""The triton backend: kernels for GPUs. Importing this package does not import triton, which takes a second."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from functools import lru_cache

#: The version that torch 2.11 comes with. pyproject.toml states the same for the extra `gpu`.
OLDEST_TRITON = (3, 6)


def reason_missing(device_type: str) -> str | None:
    """Why the backend cannot run on a device of this type; None if it can."""
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton runs on a CPU only with TRITON_INTERPRET=1"
    return _reason_against_version()


@lru_cache(maxsize=1)
def _reason_against_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    installed = importlib.metadata.version("triton")
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {installed} is installed, {'.'.join(map(str, OLDEST_TRITON))} is the oldest that compiles them"
    return None
