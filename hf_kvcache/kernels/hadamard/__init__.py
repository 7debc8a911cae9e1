"""Orthonormal Hadamard rotations of the head dimension."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.dispatch import twin
from hf_kvcache.kernels.hadamard import reference
from hf_kvcache.kernels.hadamard.reference import rotation_matrix
from hf_kvcache.kernels.page import SideFormat

__all__ = ["rotate", "rotation_matrix"]


def rotate(x: torch.Tensor, fmt: SideFormat, inverse: bool = False) -> torch.Tensor:
    """``x [..., D]`` in the rotated basis of ``fmt``, or back from it."""
    if fmt.rotation == "none":
        return x
    faster = twin("hadamard", x.device)
    if faster is not None and faster.supports(x, fmt):
        return faster.rotate(x, fmt, inverse)
    return reference.rotate(x, fmt, inverse)
