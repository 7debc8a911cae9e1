"""The choice of a backend: native on a CPU, triton elsewhere, or the one that ``HF_KVCACHE_BACKEND`` names.

Each backend is a package, :data:`FOLDERS`, which is imported when it is asked for. It has a function ``reason_missing``
and one module for each of its :data:`OPERATIONS`.
"""

from __future__ import annotations

import importlib
import logging
import os
from functools import lru_cache
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

#: Environment variable that forces a backend.
VARIABLE = "HF_KVCACHE_BACKEND"
BACKENDS = ("reference", "triton", "native")
#: The package of each backend.
FOLDERS = {"reference": "reference", "triton": "triton", "native": "cpu"}
#: The operations that a backend has kernels for. The reference does all others.
OPERATIONS = {
    "triton": (
        "decode",
        "extend",
        "column_sums",
        "latent_decode",
        "latent_gather",
        "hadamard",
        "pack",
        "encode",
        "key_scale",
        "key_basis",
        "choose",
        "static_step",
    ),
    "native": ("decode", "extend", "latent_decode", "latent_picked", "pack", "encode", "key_scale", "choose"),
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
    return importlib.import_module(f"{__package__}.{FOLDERS[backend]}.{op}")


def backends(device: str | torch.device = "cpu") -> dict[str, str]:
    """The backend that runs each operation of attention on ``device``."""
    names = {folder: backend for backend, folder in FOLDERS.items()}
    found = {op: implementation(op, torch.device(device)) for op in ("decode", "extend", "latent_decode")}
    return {op: "reference" if m is None else names[m.__name__.split(".")[2]] for op, m in found.items()}


def reason_missing(backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot run on a device of this type; None if it can."""
    if backend == "reference":
        return None
    return importlib.import_module(f"{__package__}.{FOLDERS[backend]}").reason_missing(device_type)


@lru_cache(maxsize=128)
def _implementation(op: str, device_type: str, forced: str) -> ModuleType | None:
    if forced and forced not in BACKENDS:
        raise ValueError(f"{VARIABLE}={forced!r}; accepted: {', '.join(BACKENDS)}")
    backend = forced or ("native" if device_type == "cpu" else "triton")
    if device_type == "meta" or backend == "reference" or op not in OPERATIONS[backend]:
        return None  # on the meta device there is nothing to compute
    reason = reason_missing(backend, device_type)
    if reason is not None:
        _warn(backend, reason)
        return None
    return module_of(op, backend)


@lru_cache(maxsize=16)
def _warn(backend: str, reason: str) -> None:
    logger.warning("hf_kvcache: no %s kernels (%s); the slower reference in torch is used", backend, reason)
