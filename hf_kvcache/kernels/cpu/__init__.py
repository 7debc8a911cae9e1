"""The native backend: CPU kernels in C++ behind a C interface, their build, and the modules that call them."""

from __future__ import annotations

from hf_kvcache.kernels.cpu import library


def reason_missing(device_type: str) -> str | None:
    """Why the backend cannot run on a device of this type; None if it can."""
    return library.reason_missing() if device_type == "cpu" else f"native kernels are for the CPU, not {device_type}"
