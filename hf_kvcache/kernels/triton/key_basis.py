"""The scale and the mean of the keys of a prompt in two launches, where each alone would take two.

The first launch sums over stretches of tokens, the second makes the scale of these sums, and with the scale the mean.
The sums run in the order of :mod:`~hf_kvcache.kernels.triton.key_scale` and
:mod:`~hf_kvcache.kernels.triton.key_mean`, so the results are the same bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.page import SideFormat
from hf_kvcache.kernels.triton import key_scale as scales
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.device import on_their_device
from hf_kvcache.kernels.triton.encode_side import LEAST, rotation_by_places
from hf_kvcache.kernels.triton.key_mean import DEPTH, STRETCH, TOKENS, rotate_mean, sum_stretch, supports_mean
from hf_kvcache.kernels.triton.key_scale import scale_of, stretches_at_once, sum_part

_SUM_WARPS, _BASIS_WARPS = 4, 8


def supports(fmt: SideFormat, query: torch.Tensor, keys: torch.Tensor, first: int, packed: torch.Tensor) -> bool:
    """Whether :func:`key_basis` can do such tokens: what both kernels can do, of one width and dtype."""
    alike = packed.dtype == keys.dtype and packed.shape[:2] == keys.shape[:2] and packed.shape[3] == keys.shape[3]
    known = supports_mean(fmt, packed) and scales.supports(query, keys, first, None)
    return known and alike and packed.shape[2] > 0


@on_their_device
def key_basis(
    query: torch.Tensor, keys: torch.Tensor, first: int, packed: torch.Tensor, fmt: SideFormat, mean: torch.Tensor
) -> torch.Tensor:
    """The scale of keys, and the mean of those that are packed.

    Args:
        query: ``[B, Hq, T, D]``.
        keys: ``[B, Hkv, T, D]``.
        first: the first token that counts for the scale.
        packed: ``[B, Hkv, n, D]``, ``n`` at least 1, the keys that count for the mean.
        fmt: the format of the keys' side.
        mean: float32 ``[B, Hkv, D]``, contiguous, overwritten with the mean in the rotated basis.

    Returns:
        The scale, float32 ``[B, Hkv, D]``.
    """
    query, keys, packed = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys, packed))
    batch, heads, tokens, dim = keys.shape
    rows, group, packed_tokens = batch * heads, query.shape[1] // heads, packed.shape[2]
    stretches, packed_stretches = triton.cdiv(tokens, STRETCH), triton.cdiv(packed_tokens, STRETCH)
    assert mean.is_contiguous() and mean.shape == (batch, heads, dim)
    sums = torch.empty(rows, stretches, group + 2, dim, dtype=torch.float32, device=keys.device)
    counts = torch.empty(rows, stretches, dtype=torch.float32, device=keys.device)
    packed_sums = torch.empty(rows, packed_stretches, dim, dtype=torch.float32, device=keys.device)
    scale = torch.empty(batch, heads, dim, dtype=torch.float32, device=keys.device)
    pad = max(LEAST, triton.next_power_of_2(dim))
    signs, factors = rotation_by_places(dim, pad, 8, fmt.rotation, torch.float32, keys.device)
    _sums_kernel[(rows, max(stretches, packed_stretches), 2 + group)](
        keys, *keys.stride()[:3], query, *query.stride()[:3], packed, *packed.stride()[:3], sums, counts, packed_sums,
        heads, tokens, first, packed_tokens, stretches, packed_stretches, GROUP=group, DIM=dim, PAD=pad,
        STRETCH=STRETCH, TOKENS=TOKENS, num_warps=_SUM_WARPS,
    )  # fmt: skip
    _basis_kernel[(rows,)](
        sums, counts, packed_sums, signs, factors, scale, mean, stretches, packed_stretches, packed_tokens,
        GROUP=group, DIM=dim, PAD=pad, STRETCHES=stretches_at_once(pad), DEPTH=min(DEPTH, pad),
        HALF=keys.dtype == torch.float16, num_warps=_BASIS_WARPS,
    )  # fmt: skip
    return scale


@triton.jit(do_not_specialize=["heads", "tokens", "first", "packed_tokens", "stretches", "packed_stretches"])
def _sums_kernel(
    # Tokens.
    keys,
    key_b,
    key_h,
    key_n,
    query,
    query_b,
    query_h,
    query_n,
    packed,
    packed_b,
    packed_h,
    packed_n,
    # Outputs.
    sums,
    counts,
    packed_sums,
    # Sizes.
    heads,
    tokens,
    first,
    packed_tokens,
    stretches,
    packed_stretches,
    # Constant sizes.
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    STRETCH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Sums over ``STRETCH`` tokens of a row; grid (rows, stretches, ``2 + GROUP``).

    The parts of a row are its keys, its query heads and the keys that are packed.

    Args:
        keys: ``[B, heads, tokens, DIM]``; the last dimension is contiguous, as in the others.
        key_b: elements between sequences of ``keys``; the others likewise.
        query: ``[B, heads * GROUP, tokens, DIM]``.
        packed: ``[B, heads, packed_tokens, DIM]``.
        sums: fp32 ``[rows, stretches, GROUP + 2, DIM]``, written: of the keys, of their squares, of the squares of the
            queries of each query head.
        counts: fp32 ``[rows, stretches]``, written: how many tokens count.
        packed_sums: fp32 ``[rows, packed_stretches, DIM]``, written: of the packed keys.
        heads: KV heads.
        tokens: of a sequence.
        first: the first token that counts in ``sums``.
        packed_tokens: tokens of a sequence that are packed.
        stretches: of ``tokens``.
        packed_stretches: of ``packed_tokens``.
        PAD: ``DIM`` rounded up to a power of two.
        TOKENS: tokens that are loaded at a time.
    """
    row, stretch, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    batch, head = row // heads, row % heads
    if part > GROUP:
        if stretch < packed_stretches:
            source = packed + batch * packed_b + head * packed_h
            to = packed_sums + (row * packed_stretches + stretch) * DIM
            sum_stretch(source, packed_n, to, stretch.to(tl.int64), packed_tokens, DIM, PAD, STRETCH, TOKENS)
    elif stretch < stretches:
        if part == 0:
            source, step = keys + batch * key_b + head * key_h, tl.cast(key_n, tl.int64)
        else:
            source = query + batch * query_b + (head * GROUP + part - 1) * query_h
            step = tl.cast(query_n, tl.int64)
        at = row * stretches + stretch
        sum_part(
            source, step, sums, sums, counts, at, stretch, part, tokens, first, GROUP, DIM, PAD, STRETCH, TOKENS, False
        )


@triton.jit(do_not_specialize=["stretches", "packed_stretches", "packed_tokens"])
def _basis_kernel(
    sums,
    counts,
    packed_sums,
    signs,
    factors,
    scale,
    mean,
    stretches,
    packed_stretches,
    packed_tokens,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    STRETCHES: tl.constexpr,
    DEPTH: tl.constexpr,
    HALF: tl.constexpr,
):
    """The scale and the mean of a row from the sums of its stretches; grid (rows).

    Args:
        sums: as in :func:`_sums_kernel`, like ``counts``, ``packed_sums`` and the sizes.
        signs: the rotation of the keys from ``rotation_by_places``, and its ``factors``.
        scale: fp32 ``[rows, DIM]``, written.
        mean: fp32 ``[rows, DIM]``, written.
        STRETCHES: stretches that are loaded at a time.
        DEPTH: channels of the mean that are rotated at a time.
        HALF: whether keys are in half precision, whose range bounds the scale.
    """
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, PAD)
    own = scale + row * DIM
    found = scale_of(sums, counts, row, stretches, GROUP, DIM, PAD, STRETCHES, HALF)
    tl.store(own + channel, found, mask=channel < DIM)
    tl.debug_barrier()  # the scale that other threads have stored is read next
    rotate_mean(
        packed_sums + row * packed_stretches * DIM,
        packed_stretches,
        packed_tokens,
        signs,
        factors,
        own,
        mean + row * DIM,
        DIM,
        PAD,
        DEPTH,
    )


def compile_cases(architecture: str) -> list[CompileCase]:
    """Specializations for the compile report, at 4 query heads per KV head."""
    return [_sums_case(128), *map(_basis_case, (128, 256))]


def _sums_case(dim: int) -> CompileCase:
    strides = tuple(f"{side}_{axis}" for side in ("key", "query", "packed") for axis in "bhn")
    pointers = dict.fromkeys(("keys", "query", "packed"), "*bf16")
    pointers |= dict.fromkeys(("sums", "counts", "packed_sums"), "*fp32")
    sizes = ("heads", "tokens", "first", "packed_tokens", "stretches", "packed_stretches")
    return CompileCase(
        f"key basis, sums bf16 D={dim}",
        _sums_kernel,
        {**pointers, **dict.fromkeys((*strides, *sizes), "i32")},
        {"GROUP": 4, "DIM": dim, "PAD": dim, "STRETCH": STRETCH, "TOKENS": TOKENS},
        num_warps=_SUM_WARPS,
        num_stages=1,
        aligned=(*pointers, *strides),
    )


def _basis_case(dim: int) -> CompileCase:
    names = ("sums", "counts", "packed_sums", "signs", "factors", "scale", "mean")
    sizes: dict[str, Any] = {"GROUP": 4, "DIM": dim, "PAD": dim, "STRETCHES": stretches_at_once(dim), "DEPTH": DEPTH}
    return CompileCase(
        f"key basis D={dim}",
        _basis_kernel,
        {**dict.fromkeys(names, "*fp32"), **dict.fromkeys(("stretches", "packed_stretches", "packed_tokens"), "i32")},
        sizes | {"HALF": True},
        num_warps=_BASIS_WARPS,
        num_stages=1,
        aligned=names,
    )
