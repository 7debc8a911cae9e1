"""Which implementation of an operation runs: by device, or the backend that ``HF_KVCACHE_BACKEND`` names."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
from functools import lru_cache
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

#: Environment variable that forces a backend.
VARIABLE = "HF_KVCACHE_BACKEND"
BACKENDS = ("reference", "triton", "native")
#: What torch 2.11 brings. pyproject.toml states the same for the extra `gpu`.
OLDEST_TRITON = (3, 6)
#: The folder with the kernels of each backend.
FOLDERS = {"reference": "reference", "triton": "triton", "native": "cpu"}
#: The operations that a backend has kernels for; all others run in plain torch.
OPERATIONS = {
    "triton": ("decode", "extend", "column_sums", "latent_decode", "hadamard", "pack"),
    "native": ("decode", "extend", "latent_decode", "pack"),
}


def implementation(op: str, device: torch.device) -> ModuleType | None:
    """The module with the fast implementation of ``op`` for tensors on ``device``; None for the reference.

    A backend that cannot run here is replaced by the reference, with one warning.

    Raises:
        ValueError: if ``HF_KVCACHE_BACKEND`` names no backend.
    """
    return _implementation(op, device.type, os.environ.get(VARIABLE, ""))


def module_of(op: str, backend: str) -> ModuleType:
    """The module of an operation that a backend has, whether or not it can run here."""
    return importlib.import_module(f"hf_kvcache.kernels.{FOLDERS[backend]}.{op}")


def backends(device: str | torch.device = "cpu") -> dict[str, str]:
    """The backend that runs each operation of attention on ``device``."""
    names = {folder: backend for backend, folder in FOLDERS.items()}
    found = {op: implementation(op, torch.device(device)) for op in ("decode", "extend", "latent_decode")}
    return {op: "reference" if m is None else names[m.__name__.split(".")[2]] for op, m in found.items()}


def reason_missing(backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot run on a device of this type; None if it can."""
    if backend == "native":
        from hf_kvcache.kernels.cpu import library

        return (
            library.reason_missing() if device_type == "cpu" else f"native kernels are for the CPU, not {device_type}"
        )
    if backend == "triton":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device_type == "cpu" and not interpreted:
            return "triton runs on a CPU only with TRITON_INTERPRET=1"
        return _reason_against_triton()
    return None


@lru_cache(maxsize=1)
def _reason_against_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    # Not by importing it: that costs a second, and whoever only asks may not need it.
    installed = importlib.metadata.version("triton")
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {installed} is installed, {'.'.join(map(str, OLDEST_TRITON))} is the oldest that compiles them"
    return None


@lru_cache(maxsize=128)
def _implementation(op: str, device_type: str, forced: str) -> ModuleType | None:
    if forced and forced not in BACKENDS:
        raise ValueError(f"{VARIABLE}={forced!r}; accepted: {', '.join(BACKENDS)}")
    backend = forced or ("native" if device_type == "cpu" else "triton")
    if backend == "reference" or op not in OPERATIONS[backend]:
        return None
    reason = reason_missing(backend, device_type)
    if reason is not None:
        _warn(backend, reason)
        return None
    return module_of(op, backend)


@lru_cache(maxsize=16)
def _warn(backend: str, reason: str) -> None:
    logger.warning("hf_kvcache: no %s kernels (%s); the slower reference in torch is used", backend, reason)
