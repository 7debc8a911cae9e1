"""Orthonormal Hadamard rotations of the head dimension."""

from hf_kvcache.kernels.hadamard.reference import rotation_matrix

__all__ = ["rotation_matrix"]
