"""Orthonormal Hadamard rotations of the head dimension, by the backend of their device."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.page import SideFormat
from hf_kvcache.kernels.reference import hadamard as reference
from hf_kvcache.kernels.reference.hadamard import rotation_matrix

__all__ = ["rotate", "rotation_matrix"]


def rotate(x: torch.Tensor, fmt: SideFormat, inverse: bool = False) -> torch.Tensor:
    """``x [..., D]`` in the rotated basis of ``fmt``, or back from it."""
    if fmt.rotation == "none":
        return x
    faster = implementation("hadamard", x.device)
    if faster is not None and faster.supports(x, fmt):
        return faster.rotate(x, fmt, inverse)
    return reference.rotate(x, fmt, inverse)
