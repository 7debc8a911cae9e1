"""The fast Walsh-Hadamard transform by a Triton kernel, for widths that are powers of two."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.page import SideFormat
from hf_kvcache.kernels.reference.hadamard import rotation_matrix
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.device import on_their_device

#: Elements that a program transforms.
_ELEMENTS = 4096
_WARPS = 4


@triton.jit
def _transform_kernel(
    x,
    signs,
    rotated,
    rows,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    LOG_D: tl.constexpr,
    FLIP_BEFORE: tl.constexpr,
    FLIP_AFTER: tl.constexpr,
):
    """Rows ``[rows, D]`` times the orthonormal Walsh-Hadamard matrix, channels flipped by ``signs`` before or after."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, D)
    at = row[:, None] * D + channel[None, :]
    inside = (row < rows)[:, None]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if FLIP_BEFORE:
        value *= tl.load(signs + channel)[None, :]
    # A stage combines neighbors and puts sums before differences, which rotates the bits of the channel number by one.
    # So all stages are alike (Pease 1968), and after the last one the channels are in their order.
    for _ in tl.static_range(LOG_D):
        left, right = tl.split(tl.reshape(value, [ROWS, D // 2, 2]))
        value = tl.reshape(tl.permute(tl.join(left + right, left - right), (0, 2, 1)), [ROWS, D])
    value *= 1.0 / tl.sqrt(D + 0.0)
    if FLIP_AFTER:
        value *= tl.load(signs + channel)[None, :]
    tl.store(rotated + at, value.to(rotated.dtype.element_ty), mask=inside)


def supports(x: torch.Tensor, fmt: SideFormat) -> bool:
    """Whether :func:`rotate` can do a rotation. The reference does all others by a matrix product."""
    power_of_two = fmt.dim & (fmt.dim - 1) == 0
    return (
        fmt.rotation != "none"
        and power_of_two
        and 8 <= fmt.dim <= _ELEMENTS
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and x.numel() > 0
    )


@on_their_device
def rotate(x: torch.Tensor, fmt: SideFormat, inverse: bool = False) -> torch.Tensor:
    """As :func:`hf_kvcache.kernels.reference.hadamard.rotate`, summed in float32."""
    dim = fmt.dim
    flat = x.contiguous()
    rows = x.numel() // dim
    signs = _signs(dim, x.device) if fmt.rotation == "signed_hadamard" else None
    rotated = torch.empty_like(flat)
    block = _ELEMENTS // dim
    _transform_kernel[(triton.cdiv(rows, block),)](
        flat,
        signs,
        rotated,
        rows,
        ROWS=block,
        D=dim,
        LOG_D=dim.bit_length() - 1,
        FLIP_BEFORE=signs is not None and not inverse,
        FLIP_AFTER=signs is not None and inverse,
        num_warps=_WARPS,
    )
    return rotated


@lru_cache(maxsize=64)
def _signs(dim: int, device: torch.device) -> torch.Tensor:
    """The signs of the signed rotation, float32 ``[dim]``."""
    matrix = rotation_matrix(dim, "signed_hadamard", torch.float32, device)
    assert matrix is not None
    # A cached tensor made under inference_mode could not be used outside it.
    with torch.inference_mode(False):
        # The first column of a Walsh-Hadamard matrix is positive, so the signs of this column are those of the
        # rotation.
        return matrix[:, 0].sign()


def compile_cases(architecture: str) -> list[CompileCase]:
    """Specializations for the compile report: the usual width, and a larger one with signs."""
    return [_case(128, "fp32", False), _case(512, "bf16", True)]


def _case(dim: int, dtype: str, signed: bool) -> CompileCase:
    pointers = {"x": f"*{dtype}", "rotated": f"*{dtype}"} | ({"signs": "*fp32"} if signed else {})
    constants = {"ROWS": _ELEMENTS // dim, "D": dim, "LOG_D": dim.bit_length() - 1}
    constants |= {"FLIP_BEFORE": signed, "FLIP_AFTER": False}
    return CompileCase(
        f"hadamard {dtype} d{dim}" + (" signed" if signed else ""),
        _transform_kernel,
        pointers | {"rows": "i32"},
        constants if signed else constants | {"signs": None},
        num_warps=_WARPS,
        num_stages=1,
        aligned=tuple(pointers),
    )
