"""The fast transform against the product with the matrix in float64."""

from __future__ import annotations

import pytest
import torch

from hf_kvcache.kernels.hadamard import rotation_matrix
from hf_kvcache.kernels.page import Rotation, SideFormat
from hf_kvcache.kernels.triton import hadamard as kernels
from tests.kernels.triton.fixtures import poisoned_outputs  # noqa: F401
from tests.tolerances import assert_near

#: Fewer rows than a program takes, and more; one row; leading dimensions of any kind.
SHAPES = [(1,), (3,), (2, 1, 5), (600,)]


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1]), dtype=torch.float64)


def rotated_by_hand(x: torch.Tensor, fmt: SideFormat, inverse: bool) -> torch.Tensor:
    matrix = rotation_matrix(fmt.dim, fmt.rotation, torch.float64, torch.device("cpu"))
    assert matrix is not None
    return x.double() @ (matrix.T if inverse else matrix)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("kind", ["hadamard", "signed_hadamard"])
@pytest.mark.parametrize("dim", [8, 16, 64, 128, 256, 512])
def test_against_the_matrix(dim: int, kind: Rotation, inverse: bool, device: torch.device) -> None:
    """Both rotations and both directions, for any number of rows."""
    fmt = SideFormat(dim, 4, rotation=kind)
    for shape in SHAPES if dim < 512 else SHAPES[:3]:
        x = gaussian(*shape, dim).float()
        assert kernels.supports(x, fmt)
        assert_near(kernels.rotate(x.to(device), fmt, inverse).cpu(), rotated_by_hand(x, fmt, inverse))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    """The result has the dtype of its input and is rounded once."""
    fmt = SideFormat(64, 4, rotation="signed_hadamard")
    x = gaussian(5, 64).to(dtype)
    result = kernels.rotate(x.to(device), fmt).cpu()
    assert result.dtype == dtype
    assert_near(result, rotated_by_hand(x, fmt, False))


def test_strided_rows_and_the_way_back(device: torch.device) -> None:
    """Rows that are not side by side; rotating back gives them again; the input stays as it was."""
    fmt = SideFormat(64, 4, rotation="signed_hadamard")
    x = gaussian(7, 2, 64).float().to(device)[:, 1]
    before = x.clone()
    rotated = kernels.rotate(x, fmt)
    assert_near(rotated.cpu(), rotated_by_hand(before.cpu(), fmt, False))
    assert_near(kernels.rotate(rotated, fmt, inverse=True).cpu(), before.cpu())
    assert torch.equal(x, before)


def test_what_is_left_to_the_reference() -> None:
    """Widths that are no power of two, no rotation, float64, and no rows at all."""
    assert not kernels.supports(torch.ones(2, 80), SideFormat(80, 4, rotation="hadamard"))
    assert not kernels.supports(torch.ones(2, 64), SideFormat(64, 4))
    fmt = SideFormat(64, 4, rotation="hadamard")
    assert not kernels.supports(torch.ones(2, 64, dtype=torch.float64), fmt)
    assert not kernels.supports(torch.ones(0, 64), fmt)
