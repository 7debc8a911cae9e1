"""The key mean in two launches: sums of stretches of tokens, then their sum in a fixed order, rotated."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.page import SideFormat
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.device import on_their_device
from hf_kvcache.kernels.triton.encode_side import LEAST, rotation_by_places

#: Tokens that a program sums, and those that it loads at a time.
STRETCH, TOKENS = 256, 32
_SUM_WARPS, _MEAN_WARPS = 4, 8
DUE_WARPS = 8
#: Numbers of a sequence that say what a step of a static state sets off, see ``static_kernels``.
EVENTS = 4
#: Channels of the mean that are rotated at a time.
DEPTH = 32


def supports_mean(fmt: SideFormat, keys: torch.Tensor) -> bool:
    """Whether :func:`key_mean` can do such keys."""
    return keys.dtype in (torch.float32, torch.float16, torch.bfloat16) and fmt.rotation != "none"


@on_their_device
def key_mean(fmt: SideFormat, keys: torch.Tensor, key_scale: torch.Tensor | None, mean: torch.Tensor) -> None:
    """The mean of keys over their tokens, in the rotated basis.

    Args:
        fmt: the format of the keys' side.
        keys: ``[b, heads, n, D]``, ``n`` at least 1; only the last dimension must be contiguous.
        key_scale: fp32 ``[b, heads, D]``, contiguous, by what the keys are divided before the rotation; or None.
        mean: fp32 ``[b, heads, D]``, contiguous, overwritten.
    """
    keys = keys if keys.stride(-1) == 1 else keys.contiguous()
    batch, heads, tokens, dim = keys.shape
    rows, stretches = batch * heads, triton.cdiv(tokens, STRETCH)
    if rows == 0:
        return
    assert mean.is_contiguous() and mean.shape == (batch, heads, dim)
    sums = torch.empty(rows, stretches, dim, dtype=torch.float32, device=keys.device)
    dim_pad = max(LEAST, triton.next_power_of_2(dim))
    signs, factors = rotation_by_places(dim, dim_pad, 8, fmt.rotation, torch.float32, keys.device)
    _sum_kernel[(rows, stretches)](
        keys, *keys.stride()[:3], sums, heads, tokens, DIM=dim, PAD=dim_pad, STRETCH=STRETCH, TOKENS=TOKENS,
        num_warps=_SUM_WARPS,
    )  # fmt: skip
    _mean_kernel[(rows,)](
        sums, stretches, tokens, signs, factors, key_scale, mean, DIM=dim, PAD=dim_pad, DEPTH=min(DEPTH, dim_pad),
        num_warps=_MEAN_WARPS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "tokens"])
def _sum_kernel(
    keys,
    sequence_stride,
    head_stride,
    token_stride,
    sums,
    heads,
    tokens,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    STRETCH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Sum ``STRETCH`` tokens of a row into fp32 ``sums [rows, stretches, DIM]``; grid (rows, stretches)."""
    row, stretch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    source = keys + row // heads * sequence_stride + row % heads * head_stride
    at = row * tl.num_programs(1) + stretch
    sum_stretch(source, token_stride, sums + at * DIM, stretch, tokens, DIM, PAD, STRETCH, TOKENS)


@triton.jit
def sum_stretch(
    source,
    token_stride,
    sums,
    stretch,
    tokens,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    STRETCH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Sum the tokens ``stretch * STRETCH ...`` of ``tokens`` tokens at ``source`` into fp32 ``sums [DIM]``."""
    channel = tl.arange(0, PAD)
    source += stretch * STRETCH * token_stride
    held = tokens - stretch * STRETCH
    total = tl.zeros([TOKENS, PAD], tl.float32)
    for first in range(0, STRETCH, TOKENS):
        token = first + tl.arange(0, TOKENS)
        mask = (token < held)[:, None] & (channel < DIM)[None, :]
        total += tl.load(source + token[:, None] * token_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(sums + channel, tl.sum(total, 0), mask=channel < DIM)


@triton.jit(do_not_specialize=["stretches", "tokens"])
def _mean_kernel(
    sums, stretches, tokens, signs, factors, scale, mean, DIM: tl.constexpr, PAD: tl.constexpr, DEPTH: tl.constexpr
):
    """Sum ``sums [rows, stretches, DIM]``, divide by the number of tokens and the scale, rotate; grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    own = scale
    if scale is not None:
        own += row * DIM
    rotate_mean(sums + row * stretches * DIM, stretches, tokens, signs, factors, own, mean + row * DIM, DIM, PAD, DEPTH)


@triton.jit
def rotate_mean(
    sums, stretches, tokens, signs, factors, scale, mean, DIM: tl.constexpr, PAD: tl.constexpr, DEPTH: tl.constexpr
):
    """The rotated mean, fp32 ``mean [DIM]``, of ``tokens`` tokens whose sums are fp32 ``sums [stretches, DIM]``.

    It is divided by ``scale [DIM]`` first, unless that is None.
    """
    channel = tl.arange(0, PAD)
    rotated = tl.zeros([PAD], tl.float32)
    for start in range(0, PAD, DEPTH):
        k = start + tl.arange(0, DEPTH)
        total = tl.zeros([DEPTH], tl.float32)
        for stretch in range(0, stretches):
            total += tl.load(sums + stretch * DIM + k, mask=k < DIM, other=0.0)
        if scale is not None:
            total /= tl.load(scale + k, mask=k < DIM, other=1.0)
        rotated += tl.sum((total / tokens)[None, :] * tl.load(signs + channel[:, None] * PAD + k[None, :]), 1)
    rotated *= tl.load(factors + channel)
    tl.store(mean + channel, rotated, mask=channel < DIM)


@triton.jit(do_not_specialize=["heads", "tokens", "stretches"])
def due_mean_kernel(
    # These change from launch to launch.
    events,
    sums,
    # What stays.
    keys,
    sequence_stride,
    head_stride,
    token_stride,
    signs,
    factors,
    scale,
    mean,
    heads,
    tokens,
    stretches,
    EVENTS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    STRETCH: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """:func:`key_mean` of the rows whose first page is due, in one launch; grid (rows).

    Args:
        events: int64 ``[B, EVENTS]``; the last number of a sequence says whether its key mean is to be fixed.
        sums: fp32 ``[rows, stretches, DIM]``, scratch memory.
        keys: ``[B, heads, tokens, DIM]``, with the strides that follow.
        scale: fp32 ``[rows, DIM]``, by what the keys are divided before the rotation; or None.
        mean: fp32 ``[rows, DIM]``, written.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(events + row // heads * EVENTS + EVENTS - 1) != 0:
        source = keys + row // heads * sequence_stride + row % heads * head_stride
        own = sums + row * stretches * DIM
        for stretch in range(0, stretches):
            sum_stretch(
                source, token_stride, own + stretch * DIM, stretch, tokens, DIM, PAD, STRETCH, TOKENS
            )  # fmt: skip
        tl.debug_barrier()  # the sums that other threads have stored are read next
        divisor = scale
        if scale is not None:
            divisor += row * DIM
        rotate_mean(own, stretches, tokens, signs, factors, divisor, mean + row * DIM, DIM, PAD, DEPTH)


def due_mean_arguments(
    fmt: SideFormat, keys: torch.Tensor, scale: torch.Tensor | None, mean: torch.Tensor
) -> dict[str, Any]:
    """The arguments of :func:`due_mean_kernel` but ``events`` and ``sums``; ``keys [b, heads, n, D]`` are those due."""
    _, heads, tokens, dim = keys.shape
    dim_pad = max(LEAST, triton.next_power_of_2(dim))
    signs, factors = rotation_by_places(dim, dim_pad, 8, fmt.rotation, torch.float32, keys.device)
    strides = dict(zip(("sequence_stride", "head_stride", "token_stride"), keys.stride()[:3], strict=True))
    return {
        "keys": keys,
        **strides,
        "signs": signs,
        "factors": factors,
        "scale": scale,
        "mean": mean,
        "heads": heads,
        "tokens": tokens,
        "stretches": stretches_of(tokens),
        "EVENTS": EVENTS,
        "DIM": dim,
        "PAD": dim_pad,
        "STRETCH": STRETCH,
        "TOKENS": TOKENS,
        "DEPTH": min(DEPTH, dim_pad),
    }


def stretches_of(tokens: int) -> int:
    """Stretches whose sums are added to find the mean of so many tokens."""
    return -(-tokens // STRETCH)


def compile_cases(architecture: str) -> list[CompileCase]:
    """Specializations for the compile report."""
    constants = {"DIM": 128, "PAD": 128}
    strides = ("sequence_stride", "head_stride", "token_stride")
    return [
        CompileCase(
            "key mean, sums bf16 D=128",
            _sum_kernel,
            {"keys": "*bf16", **dict.fromkeys(strides, "i32"), "sums": "*fp32", "heads": "i32", "tokens": "i32"},
            constants | {"STRETCH": STRETCH, "TOKENS": TOKENS},
            num_warps=_SUM_WARPS,
            num_stages=1,
            aligned=("keys", *strides, "sums"),
        ),
        CompileCase(
            "key mean D=128",
            _mean_kernel,
            {
                "sums": "*fp32",
                "stretches": "i32",
                "tokens": "i32",
                "signs": "*fp32",
                "factors": "*fp32",
                "scale": "*fp32",
                "mean": "*fp32",
            },
            constants | {"DEPTH": DEPTH},
            num_warps=_MEAN_WARPS,
            num_stages=1,
            aligned=("sums", "signs", "factors", "scale", "mean"),
        ),
        CompileCase(
            "key mean where due bf16 D=128",
            due_mean_kernel,
            {
                "events": "*i64",
                "sums": "*fp32",
                "keys": "*bf16",
                **dict.fromkeys(strides, "i32"),
                **dict.fromkeys(("signs", "factors", "scale", "mean"), "*fp32"),
                **dict.fromkeys(("heads", "tokens", "stretches"), "i32"),
            },
            constants | {"EVENTS": EVENTS, "STRETCH": STRETCH, "TOKENS": TOKENS, "DEPTH": DEPTH},
            num_warps=DUE_WARPS,
            num_stages=1,
            aligned=("events", "sums", "keys", *strides, "signs", "factors", "scale", "mean"),
        ),
    ]
