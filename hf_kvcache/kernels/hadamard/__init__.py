"""Orthonormal Hadamard rotations of the head dimension."""

from hf_kvcache.kernels.hadamard.reference import rotate, rotation_matrix, rotation_signs

__all__ = ["rotate", "rotation_matrix", "rotation_signs"]
