"""The scale of keys in two launches: sums over stretches of tokens, then the scale from their sums in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.reference import key_scale as reference
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.device import on_their_device
from hf_kvcache.kernels.triton.key_mean import STRETCH, TOKENS
from hf_kvcache.kernels.triton.sides import TRITON_TYPES

_LARGEST, _HALF = tl.constexpr(reference.LARGEST_EXPONENT), tl.constexpr(reference.HALF_EXPONENT)
_LEAST_TOKENS, _LEAST_POWER = tl.constexpr(reference.LEAST_TOKENS), tl.constexpr(reference.LEAST_POWER)
_TINY = tl.constexpr(reference.TINY)
#: A float32 number of this size has no fraction: adding and subtracting it rounds to the nearest integer, half to even.
_INTEGERS = tl.constexpr(1.5 * 2**23)
#: Stretches of tokens whose sums are loaded at a time, at most.
_STRETCHES = 16
_WARPS = 4
#: The widest keys that the registers hold.
_MOST_DIM = 512


def supports(query: torch.Tensor, keys: torch.Tensor, first: int, counted: torch.Tensor | None) -> bool:
    """Whether :func:`key_scale` can do such tokens: of one dtype, at most 512 wide."""
    return keys.shape[3] <= _MOST_DIM and query.dtype == keys.dtype and keys.dtype in TRITON_TYPES and keys.numel() > 0


@on_their_device
def key_scale(query: torch.Tensor, keys: torch.Tensor, first: int, counted: torch.Tensor | None) -> torch.Tensor:
    """As :func:`hf_kvcache.kernels.reference.key_scale.key_scale`, of dtypes of 16 or 32 bits."""
    query, keys = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys))
    batch, heads, tokens, dim = keys.shape
    rows, group, stretches = batch * heads, query.shape[1] // heads, triton.cdiv(tokens, STRETCH)
    sums = torch.empty(rows, stretches, group + 2, dim, dtype=torch.float32, device=keys.device)
    counts = torch.empty(rows, stretches, dtype=torch.float32, device=keys.device)
    scale = torch.empty(batch, heads, dim, dtype=torch.float32, device=keys.device)
    pad = triton.next_power_of_2(dim)
    shown = sums if counted is None else counted.contiguous().view(torch.uint8)
    _sums_kernel[(rows, stretches, 1 + group)](
        keys, *keys.stride()[:3], query, *query.stride()[:3], shown, sums, counts, heads, tokens, first, GROUP=group,
        DIM=dim, PAD=pad, STRETCH=STRETCH, TOKENS=TOKENS, COUNTED=counted is not None, num_warps=_WARPS,
    )  # fmt: skip
    _scale_kernel[(rows,)](
        sums, counts, scale, stretches, GROUP=group, DIM=dim, PAD=pad, STRETCHES=stretches_at_once(pad),
        HALF=keys.dtype == torch.float16, num_warps=_WARPS,
    )  # fmt: skip
    return scale


def stretches_at_once(pad: int) -> int:
    """Stretches whose sums are loaded at a time."""
    return max(1, min(_STRETCHES, 2048 // pad))


@triton.jit(do_not_specialize=["heads", "tokens", "first"])
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
    counted,
    # Outputs.
    sums,
    counts,
    # Sizes.
    heads,
    tokens,
    first,
    # Constant sizes.
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    STRETCH: tl.constexpr,
    TOKENS: tl.constexpr,
    # Switches.
    COUNTED: tl.constexpr,
):
    """Sums over ``STRETCH`` tokens of a row; grid (rows, stretches, ``1 + GROUP``), the keys first.

    Args:
        keys: ``[B, heads, tokens, DIM]``; the last dimension is contiguous.
        key_b: elements between sequences of ``keys``; the others likewise.
        query: ``[B, heads * GROUP, tokens, DIM]``; the last dimension is contiguous.
        counted: uint8 ``[B, tokens]``, 0 where a token does not count; read if ``COUNTED``.
        sums: fp32 ``[rows, stretches, GROUP + 2, DIM]``, written: of the keys, of their squares, of the squares of the
            queries of each query head.
        counts: fp32 ``[rows, stretches]``, written: how many tokens count.
        heads: KV heads.
        tokens: of a sequence.
        first: the first token that counts; used unless ``COUNTED``.
        PAD: ``DIM`` rounded up to a power of two.
        TOKENS: tokens that are loaded at a time.
    """
    row, stretch, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    batch, head = row // heads, row % heads
    if part == 0:
        source, step = keys + batch * key_b + head * key_h, tl.cast(key_n, tl.int64)
    else:
        source = query + batch * query_b + (head * GROUP + part - 1) * query_h
        step = tl.cast(query_n, tl.int64)
    at = row * tl.num_programs(1) + stretch
    shown = counted
    if COUNTED:
        shown += batch * tokens
    sum_part(
        source, step, shown, sums, counts, at, stretch, part, tokens, first, GROUP, DIM, PAD, STRETCH, TOKENS, COUNTED
    )


@triton.jit
def sum_part(
    source,
    step,
    counted,
    sums,
    counts,
    at,
    stretch,
    part,
    tokens,
    first,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    STRETCH: tl.constexpr,
    TOKENS: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """The sums of stretch ``stretch`` of a row's keys, part 0, or of a query head; they are number ``at`` of ``sums``.

    ``source`` is the first vector, ``step`` elements before the next one, ``counted`` the first token of the sequence.
    All else is described in :func:`_sums_kernel`.
    """
    channel = tl.arange(0, PAD)
    total = tl.zeros([TOKENS, PAD], tl.float32)
    squares = tl.zeros([TOKENS, PAD], tl.float32)
    count = tl.zeros([TOKENS], tl.float32)
    for start in range(0, STRETCH, TOKENS):
        token = stretch * STRETCH + start + tl.arange(0, TOKENS)
        if COUNTED:
            held = tl.load(counted + token, mask=token < tokens, other=0) != 0
        else:
            held = (token >= first) & (token < tokens)
        # Nothing is read of a token that does not count: it may be NaN.
        mask = held[:, None] & (channel < DIM)[None, :]
        x = tl.load(source + token[:, None] * step + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        total += x
        squares += x * x
        count += held.to(tl.float32)
    there = channel < DIM
    to = sums + (at * (GROUP + 2) + part + 1) * DIM + channel
    tl.store(to, tl.sum(squares, 0), mask=there)
    if part == 0:
        tl.store(to - DIM, tl.sum(total, 0), mask=there)
        tl.store(counts + at, tl.sum(count, 0))


@triton.jit
def _above_all(x, there, DIM: tl.constexpr):
    """``x [PAD]`` and what every channel has at least, a share of the mean over the channels ``there``."""
    mean = tl.sum(tl.where(there, x, 0.0), 0) / DIM
    return x + _LEAST_POWER * mean + _TINY


@triton.jit(do_not_specialize=["stretches"])
def _scale_kernel(
    sums,
    counts,
    scale,
    stretches,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    STRETCHES: tl.constexpr,
    HALF: tl.constexpr,
):
    """The scale of a row from the sums of its stretches; grid (rows).

    Args:
        sums: as in :func:`_sums_kernel`, like ``counts``, ``GROUP``, ``DIM`` and ``PAD``.
        scale: fp32 ``[rows, DIM]``, written.
        stretches: of a row.
        STRETCHES: those that are loaded at a time.
        HALF: whether keys are in half precision, whose range bounds the scale.
    """
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, PAD)
    result = scale_of(sums, counts, row, stretches, GROUP, DIM, PAD, STRETCHES, HALF)
    tl.store(scale + row * DIM + channel, result, mask=channel < DIM)


@triton.jit
def scale_of(
    sums,
    counts,
    row,
    stretches,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    STRETCHES: tl.constexpr,
    HALF: tl.constexpr,
):
    """The scale of a row, fp32 ``[PAD]``, from the sums of its stretches; see :func:`_scale_kernel`."""
    channel = tl.arange(0, PAD)
    there = channel < DIM
    total = tl.zeros([STRETCHES, PAD], tl.float32)
    squares = tl.zeros([STRETCHES, PAD], tl.float32)
    power = tl.zeros([STRETCHES, PAD], tl.float32)
    counted = tl.zeros([STRETCHES], tl.float32)
    for start in range(0, stretches, STRETCHES):
        stretch = start + tl.arange(0, STRETCHES)
        at = row * stretches + stretch
        mask = (stretch < stretches)[:, None] & there[None, :]
        own = sums + (at * (GROUP + 2))[:, None] * DIM + channel[None, :]
        total += tl.load(own, mask=mask, other=0.0)
        squares += tl.load(own + DIM, mask=mask, other=0.0)
        for head in range(GROUP):
            power += tl.load(own + (2 + head) * DIM, mask=mask, other=0.0)
        counted += tl.load(counts + at, mask=stretch < stretches, other=0.0)
    found = tl.sum(counted, 0)
    count = tl.maximum(found, 1.0)
    square, mean = tl.sum(squares, 0) / count, tl.sum(total, 0) / count
    spread = square - mean * mean
    spread = tl.where(spread < 0, 0.0, spread)  # not a maximum, which would hide NaN
    powers = tl.sum(power, 0) / GROUP / count
    ratio = tl.log2(_above_all(spread, there, DIM)) - tl.log2(_above_all(powers, there, DIM))
    exponent = ratio / 4
    exponent -= tl.sum(tl.where(there, exponent, 0.0), 0) / DIM
    exponent = tl.where(exponent != exponent, 0.0, tl.minimum(tl.maximum(exponent, -_LARGEST), _LARGEST))
    exponent = (exponent + _INTEGERS) - _INTEGERS
    if HALF:
        lowest = tl.ceil(tl.log2(square) / 2 - _HALF)
        lowest = tl.where(lowest != lowest, 0.0, tl.minimum(lowest, _LARGEST))
        exponent = tl.maximum(exponent, lowest)
    bits = (exponent.to(tl.int32) + 127) << 23
    return tl.where(found < _LEAST_TOKENS, 1.0, bits.to(tl.float32, bitcast=True))


def compile_cases(architecture: str) -> list[CompileCase]:
    """Specializations for the compile report, at 4 query heads per KV head."""
    return [*(_sums_case(128, counted) for counted in (False, True)), *map(_scale_case, (128, 256))]


def _sums_case(dim: int, counted: bool) -> CompileCase:
    strides = tuple(f"{side}_{axis}" for side in ("key", "query") for axis in "bhn")
    pointers = {"keys": "*bf16", "query": "*bf16", "counted": "*u8", "sums": "*fp32", "counts": "*fp32"}
    sizes: dict[str, Any] = {"GROUP": 4, "DIM": dim, "PAD": dim, "STRETCH": STRETCH, "TOKENS": TOKENS}
    return CompileCase(
        f"key scale, sums bf16 D={dim}" + (" counted" if counted else ""),
        _sums_kernel,
        {**pointers, **dict.fromkeys((*strides, "heads", "tokens", "first"), "i32")},
        sizes | {"COUNTED": counted},
        num_warps=_WARPS,
        num_stages=1,
        aligned=(*pointers, *strides),
    )


def _scale_case(dim: int) -> CompileCase:
    pointers = dict.fromkeys(("sums", "counts", "scale"), "*fp32")
    return CompileCase(
        f"key scale D={dim}",
        _scale_kernel,
        {**pointers, "stretches": "i32"},
        {"GROUP": 4, "DIM": dim, "PAD": dim, "STRETCHES": stretches_at_once(dim), "HALF": True},
        num_warps=_WARPS,
        num_stages=1,
        aligned=tuple(pointers),
    )
