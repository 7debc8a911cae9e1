"""Hadamard matrices as plain dense orthonormal matrices: the definition of the rotation."""

from __future__ import annotations

from functools import lru_cache

import torch

from hf_kvcache.kernels.page import Rotation, SideFormat

# The signs of a signed Hadamard rotation are part of the page format: saved pages can be read with these signs only.
_SIGN_SEED = 0x5EED


@lru_cache(maxsize=64)
def rotation_matrix(dim: int, kind: Rotation, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """The matrix ``R [dim, dim]`` with ``rotated = x @ R`` and ``x = rotated @ R.T``; None for ``kind="none"``."""
    if kind == "none":
        return None
    # A cached tensor made under inference_mode could not be used outside it.
    with torch.inference_mode(False):
        matrix = _orthonormal(dim)
        matrix = rotation_signs(dim, kind).to(matrix.dtype)[:, None] * matrix
        return matrix.to(dtype=dtype, device=device)


@lru_cache(maxsize=64)
def rotation_signs(dim: int, kind: Rotation) -> torch.Tensor:
    """The signs ``[dim]``, float32 on the CPU, by which channels are multiplied before the Hadamard matrix."""
    with torch.inference_mode(False):
        if kind != "signed_hadamard":
            return torch.ones(dim, dtype=torch.float32, device="cpu")
        drawn = torch.randint(0, 2, (dim,), generator=torch.Generator().manual_seed(_SIGN_SEED + dim), device="cpu")
        return 2 * drawn.to(torch.float32) - 1


def rotate(x: torch.Tensor, fmt: SideFormat, inverse: bool = False) -> torch.Tensor:
    """``x [..., D]`` in the rotated basis of ``fmt``, or back from it."""
    matrix = rotation_matrix(fmt.dim, fmt.rotation, x.dtype, x.device)
    if matrix is None:
        return x
    return x @ (matrix.T if inverse else matrix)


def _orthonormal(dim: int) -> torch.Tensor:
    """A float64 orthonormal matrix with entries +-1/sqrt(dim), or a block-diagonal one where there is none."""
    hadamard = _hadamard(dim)
    if hadamard is not None:
        return hadamard / dim**0.5
    # There is no construction here for this dimension (72, say): a block of the largest power of two, then the rest.
    block = 1 << (dim.bit_length() - 1)
    return torch.block_diag(_orthonormal(block), _orthonormal(dim - block))


def _hadamard(dim: int) -> torch.Tensor | None:
    """A Hadamard matrix of order ``dim``, by Sylvester's doubling of order 1, or of Paley's 12 and 20 (80, 96)."""
    order, doublings = dim, 0
    while order % 2 == 0 and order not in (12, 20):
        order, doublings = order // 2, doublings + 1
    if order not in (1, 12, 20):
        return None
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu") if order == 1 else _paley(order - 1)
    for _ in range(doublings):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix


def _paley(q: int) -> torch.Tensor:
    """Paley's first construction for a prime ``q = 3 mod 4``: a Hadamard matrix of order ``q + 1``."""
    residues = {(i * i) % q for i in range(1, q)}
    jacobsthal = torch.tensor(
        [[0 if i == j else (1 if (i - j) % q in residues else -1) for j in range(q)] for i in range(q)],
        dtype=torch.float64,
        device="cpu",
    )
    matrix = torch.ones(q + 1, q + 1, dtype=torch.float64, device="cpu")
    matrix[1:, 0] = -1
    matrix[1:, 1:] = jacobsthal + torch.eye(q, dtype=torch.float64, device="cpu")
    return matrix
