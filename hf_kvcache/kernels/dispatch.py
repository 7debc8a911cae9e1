"""Which twin of a kernel runs: by device, or the one that ``HF_KVCACHE_BACKEND`` names."""

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
#: The folders of this package that have a twin of their own for a backend.
TWINS = {
    "triton": ("decode", "extend", "column_mass", "latent_decode", "hadamard", "pack"),
    "native": ("decode", "extend", "latent_decode", "pack"),
}


def twin(op: str, device: torch.device) -> ModuleType | None:
    """The module with the faster twin of ``op`` for tensors on ``device``; None for the reference.

    A twin that is missing or cannot run here is replaced by the reference, with one warning where it was asked for by
    name or is what the device should have.

    Raises:
        ValueError: if ``HF_KVCACHE_BACKEND`` names no backend.
    """
    return _twin(op, device.type, os.environ.get(VARIABLE, ""))


def reason_missing(backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot run on a device of this type; None if it can."""
    if backend == "native":
        from hf_kvcache.kernels.native import library

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
def _twin(op: str, device_type: str, forced: str) -> ModuleType | None:
    if forced and forced not in BACKENDS:
        raise ValueError(f"{VARIABLE}={forced!r}; accepted: {', '.join(BACKENDS)}")
    backend = forced or ("native" if device_type == "cpu" else "triton")
    if backend == "reference" or op not in TWINS[backend]:
        return None
    reason = reason_missing(backend, device_type)
    if reason is not None:
        _warn(backend, reason)
        return None
    return importlib.import_module(f"hf_kvcache.kernels.{op}.{backend}")


@lru_cache(maxsize=16)
def _warn(backend: str, reason: str) -> None:
    logger.warning("hf_kvcache: no %s kernels (%s); the slower reference in torch is used", backend, reason)
