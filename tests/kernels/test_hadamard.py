"""Rotations of the head dimension."""

from __future__ import annotations

import hashlib

import pytest
import torch

from hf_kvcache.kernels.hadamard import rotation_matrix
from hf_kvcache.kernels.page import Rotation
from tests.tolerances import assert_near

CPU = torch.device("cpu")
#: The start of the SHA-256 of the signs, row by row.
PINNED = [
    (64, "hadamard", "ce50b224875b473e"),
    (64, "signed_hadamard", "c22f9ce5db90f0e8"),
    (80, "hadamard", "f17d18afc8c0e55d"),
    (80, "signed_hadamard", "582adef7444e122c"),
    (96, "hadamard", "727e62a99791040c"),
    (96, "signed_hadamard", "8fd3ffc0aa1968ff"),
    (128, "hadamard", "1b6c34d1427245f1"),
    (128, "signed_hadamard", "b07db6d08bef695e"),
    (256, "hadamard", "e32f8cadb75c10e4"),
    (256, "signed_hadamard", "6b95de8db749911f"),
]
DIMS = [8, 16, 24, 40, 64, 72, 80, 96, 128, 160, 192, 256, 512]


def matrix(dim: int, kind: Rotation = "hadamard", dtype: torch.dtype = torch.float64) -> torch.Tensor:
    rotation = rotation_matrix(dim, kind, dtype, CPU)
    assert rotation is not None
    return rotation


def sign_digest(rotation: torch.Tensor) -> str:
    return hashlib.sha256(bytes((rotation > 0).flatten().tolist())).hexdigest()[:16]


@pytest.mark.parametrize("kind", ["hadamard", "signed_hadamard"])
@pytest.mark.parametrize("dim", DIMS)
def test_orthonormal(dim: int, kind: Rotation) -> None:
    """Rotating and rotating back is the identity, and lengths do not change, up to float64 rounding."""
    rotation = matrix(dim, kind)
    assert_near(rotation @ rotation.T, torch.eye(dim, dtype=torch.float64))
    assert_near(rotation.T @ rotation, torch.eye(dim, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["hadamard", "signed_hadamard"])
@pytest.mark.parametrize("dim", [8, 16, 64, 80, 96, 128, 256, 512])
def test_every_entry_spreads_alike(dim: int, kind: Rotation) -> None:
    """Where a Hadamard matrix exists, every channel goes to every rotated channel in equal parts."""
    assert_near(matrix(dim, kind).abs(), torch.full((dim, dim), dim**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("dim", [8, 64, 128, 256])
def test_powers_of_two_are_walsh(dim: int) -> None:
    """Entry (i, j) is ``(-1) ** popcount(i & j) / sqrt(dim)``."""
    walsh = [[1 - 2 * (bin(i & j).count("1") % 2) for j in range(dim)] for i in range(dim)]
    assert_near(matrix(dim), torch.tensor(walsh, dtype=torch.float64) / dim**0.5)


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_signs_flip_whole_channels(dim: int) -> None:
    """The signed rotation is a flip of input channels, some but not all, followed by the plain rotation."""
    flips = matrix(dim, "signed_hadamard") @ matrix(dim).T
    assert_near(flips, torch.diag(flips.diagonal().sign()))
    assert dim / 4 < int((flips.diagonal() < 0).sum()) < 3 * dim / 4


def test_signs_do_not_depend_on_the_process() -> None:
    """The signs neither read nor change the global random state, and are the same when made again."""
    torch.manual_seed(1)
    first, state = matrix(96, "signed_hadamard"), torch.get_rng_state()
    rotation_matrix.cache_clear()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(matrix(96, "signed_hadamard"), first)


@pytest.mark.parametrize(("dim", "kind", "digest"), PINNED)
def test_matrices_are_part_of_the_page_format(dim: int, kind: Rotation, digest: str) -> None:
    """A saved page can only be read with the matrix it was written with."""
    assert sign_digest(matrix(dim, kind)) == digest


def test_dtypes_and_no_rotation() -> None:
    """The matrix comes in the dtype asked for; no rotation is None."""
    assert rotation_matrix(64, "none", torch.float32, CPU) is None
    assert_near(matrix(80, dtype=torch.float32), matrix(80))
    with torch.inference_mode():
        made_inside = matrix(88, dtype=torch.float32)
    assert not made_inside.is_inference()
