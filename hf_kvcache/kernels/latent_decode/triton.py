"""Absorbed multi-head latent attention for GPUs: tokens are split between programs, and a second kernel merges.

A program reads a tile of latents once and uses it twice, as keys and as values, for up to 64 rows (query heads times
queries), which is what makes the cache's bytes the only traffic that counts (FlashMLA does the same).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.compile_case import CompileCase
from hf_kvcache.kernels.visibility import Visibility

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _split_kernel(
    query,
    latents,
    rotary,
    positions,
    unused,
    partial,
    partial_lse,
    factor,
    tokens,
    split_tokens,
    start,
    length,
    window,
    rows,
    query_row,
    latent_batch,
    latent_token,
    rotary_batch,
    rotary_token,
    R: tl.constexpr,
    DR: tl.constexpr,
    BLOCK_DR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    HAS_UNUSED: tl.constexpr,
):
    """Attention of ``BLOCK_M`` rows to one split of the tokens of a sequence, in float32, with its log2-sum-exp2."""
    split, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, R)
    rotary_channel = tl.arange(0, BLOCK_DR)
    inside = row < rows
    at_query = query + (batch * rows + row[:, None]) * query_row
    wide = tl.load(at_query + channel[None, :], mask=inside[:, None], other=0.0)
    turned = tl.load(
        at_query + R + rotary_channel[None, :], mask=inside[:, None] & (rotary_channel[None, :] < DR), other=0.0
    )
    query_at = start + row % length
    latents += batch * latent_batch
    rotary += batch * rotary_batch
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_M, R], tl.float32)
    first = split * split_tokens
    stop = tl.minimum(first + split_tokens, tokens)
    for tile in range(first, stop, BLOCK_N):
        token = tile + tl.arange(0, BLOCK_N)
        held = token < stop
        at = token.to(tl.int64)
        latent = tl.load(latents + at[:, None] * latent_token + channel[None, :], mask=held[:, None], other=0.0)
        turned_key = tl.load(
            rotary + at[:, None] * rotary_token + rotary_channel[None, :],
            mask=held[:, None] & (rotary_channel[None, :] < DR),
            other=0.0,
        )
        scores = tl.dot(wide, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(turned, tl.trans(turned_key), scores, input_precision="ieee") * factor
        seen = held[None, :]
        if HAS_UNUSED:
            seen = seen & (tl.load(unused + batch * tokens + at, mask=held, other=1) == 0)[None, :]
        if HAS_POSITIONS:
            position = tl.load(positions + batch * tokens + at, mask=held, other=0)
            if CAUSAL:
                seen = seen & (position[None, :] <= query_at[:, None])
            if WINDOWED:
                seen = seen & (position[None, :] > query_at[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # A row that has seen nothing yet has a peak of -inf, and -inf - -inf is not a number.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(weights, 1)
        output = tl.dot(weights.to(latent.dtype), latent, output * decay[:, None], input_precision="ieee")
        peak = new_peak
    output = output / tl.where(total == 0.0, 1.0, total)[:, None]
    slot = (batch * tl.num_programs(0) + split) * rows + row
    tl.store(partial + slot[:, None] * R + channel[None, :], output, mask=inside[:, None])
    tl.store(partial_lse + slot, peak + tl.log2(total), mask=inside)


@triton.jit
def _merge_kernel(
    partial,
    partial_lse,
    output,
    log_sum_exp,
    splits,
    rows,
    length,
    R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The attention of one row from that over its splits; rows ``(head, query)`` go to ``[B, q, H, r]``."""
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, R)
    peak = float("-inf")
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        lse = tl.load(partial_lse + (batch * splits + split) * rows + row, mask=split < splits, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(lse, 0))
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    total = 0.0
    result = tl.zeros([R], tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        slot = (batch * splits + split) * rows + row
        weight = tl.exp2(tl.load(partial_lse + slot, mask=split < splits, other=float("-inf")) - shift)
        part = tl.load(partial + slot[:, None] * R + channel[None, :], mask=(split < splits)[:, None], other=0.0)
        total += tl.sum(weight, 0)
        result += tl.sum(part * weight[:, None], 0)
    result = result / tl.where(total == 0.0, 1.0, total)
    at = (batch * length + row % length) * (rows // length) + row // length
    tl.store(output + at * R + channel, result.to(output.dtype.element_ty))
    tl.store(log_sum_exp + batch * rows + row, (peak + tl.log2(total)) / LOG2_E)


class _Tiles(NamedTuple):
    """How much a program takes at a time: rows, tokens, warps and pipeline stages."""

    rows: int
    tokens: int
    warps: int
    stages: int


def _tiles(rows: int, dtype: torch.dtype, hip: bool, shared_bytes: int) -> _Tiles:
    """The largest tiles that leave 8 warps on a multiprocessor and nothing spilled, from the compile report."""
    block = 16 if rows <= 16 or dtype == torch.float32 else 32
    if hip:
        return _Tiles(block, 16, 4 if block == 16 and dtype != torch.float32 else 8, 1)
    tokens = 16 if dtype == torch.float32 else 32
    return _Tiles(block, tokens, 8, 3 if shared_bytes >= 160 * 1024 else 2)


def supports(
    query: torch.Tensor,
    latents: torch.Tensor,
    rotary_keys: torch.Tensor,
    visibility: Visibility | None,
    positions: torch.Tensor | None,
) -> bool:
    """Whether :func:`latent_decode` can do this; the reference does the rest."""
    rank = latents.shape[-1]
    return (
        query.dtype == latents.dtype == rotary_keys.dtype
        and query.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and rank in (16, 32, 64, 128, 256, 512)
        # Rows of 512 float32 numbers do not fit in the registers of an AMD program.
        and not (torch.version.hip is not None and query.dtype == torch.float32 and rank > 256)
        and rotary_keys.shape[-1] <= 128
        and latents.stride(-1) == rotary_keys.stride(-1) == 1
        and query.numel() > 0
        and (positions is None or (visibility is not None and visibility.mask is None))
    )


def latent_decode(
    query: torch.Tensor,
    latents: torch.Tensor,
    rotary_keys: torch.Tensor,
    scaling: float,
    visibility: Visibility | None = None,
    positions: torch.Tensor | None = None,
    unused: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`hf_kvcache.kernels.latent_decode.reference.latent_decode`, of one dtype and without a mask."""
    batch, heads, length, width = query.shape
    tokens, rank = latents.shape[1:]
    rows = heads * length
    multiprocessors, shared_bytes = _device(query.device)
    tiles = _tiles(rows, query.dtype, torch.version.hip is not None, shared_bytes)
    row_tiles = triton.cdiv(rows, tiles.rows)
    # Two programs for each multiprocessor; splits are whole tiles, and none is empty but for an empty cache.
    wanted = max(1, 2 * multiprocessors // (batch * row_tiles))
    split_tokens = max(1, triton.cdiv(triton.cdiv(tokens, tiles.tokens), wanted)) * tiles.tokens
    splits = max(1, triton.cdiv(tokens, split_tokens))
    partial = query.new_empty(batch, splits, rows, rank, dtype=torch.float32)
    partial_lse = query.new_empty(batch, splits, rows, dtype=torch.float32)
    seen = visibility or Visibility(0, length, None, 0, False, None)
    dr = rotary_keys.shape[-1]
    _split_kernel[(splits, row_tiles, batch)](
        query.contiguous(),
        latents,
        rotary_keys,
        positions if positions is None else positions.contiguous(),
        unused if unused is None else unused.contiguous(),
        partial,
        partial_lse,
        scaling * LOG2_E.value,
        tokens,
        split_tokens,
        seen.start,
        length,
        seen.window or 0,
        rows,
        width,
        latents.stride(0),
        latents.stride(1),
        rotary_keys.stride(0),
        rotary_keys.stride(1),
        R=rank,
        DR=dr,
        BLOCK_DR=max(16, triton.next_power_of_2(dr)),
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.tokens,
        HAS_POSITIONS=positions is not None,
        CAUSAL=seen.causal,
        WINDOWED=seen.window is not None,
        HAS_UNUSED=unused is not None,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    output = query.new_empty(batch, length, heads, rank)
    log_sum_exp = query.new_empty(batch, heads, length, dtype=torch.float32)
    _merge_kernel[(rows, batch)](
        partial, partial_lse, output, log_sum_exp, splits, rows, length, R=rank, BLOCK_S=_MERGED_AT_ONCE, num_warps=4
    )
    return output, log_sum_exp


#: Splits that the second kernel reads at a time.
_MERGED_AT_ONCE = 16


def _device(device: torch.device) -> tuple[int, int]:
    """Multiprocessors and bytes of shared memory of a program; of a small GPU where there is none (the interpreter)."""
    if device.type != "cuda":
        return 2, 99 * 1024
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 64 * 1024)


#: Shared memory of a program, by target.
_SHARED_BYTES = {"sm80": 163 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024}
_TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def compile_cases(architecture: str) -> list[CompileCase]:
    """DeepSeek-V2's widths (r = 512, dr = 64) for one and for many rows, with and without positions."""
    cases = [
        _split_case(architecture, 512, 1, "bf16", False),
        _split_case(architecture, 512, 32, "bf16", True),
        _split_case(architecture, 256 if architecture.startswith("gfx") else 512, 32, "fp32", True),
    ]
    signature = {"partial": "*fp32", "partial_lse": "*fp32", "output": "*bf16", "log_sum_exp": "*fp32"}
    signature |= dict.fromkeys(("splits", "rows", "length"), "i32")
    constants = {"R": 512, "BLOCK_S": _MERGED_AT_ONCE}
    pointers = ("partial", "partial_lse", "output", "log_sum_exp")
    cases.append(
        CompileCase(
            "latent_decode merge r512",
            _merge_kernel,
            signature,
            constants,
            num_warps=4,
            num_stages=2,
            aligned=pointers,
            loop_bytes=_MERGED_AT_ONCE * 513 * 4,
        )
    )
    return cases


def _split_case(architecture: str, rank: int, rows: int, dtype: str, everything: bool) -> CompileCase:
    tiles = _tiles(rows, _TYPES[dtype], architecture.startswith("gfx"), _SHARED_BYTES.get(architecture, 99 * 1024))
    pointers = {"query": f"*{dtype}", "latents": f"*{dtype}", "rotary": f"*{dtype}"}
    pointers |= {"partial": "*fp32", "partial_lse": "*fp32"}
    optional = {"positions": "*i64", "unused": "*i1"} if everything else {}
    strides = ("query_row", "latent_batch", "latent_token", "rotary_batch", "rotary_token")
    numbers = ("tokens", "split_tokens", "start", "length", "window", "rows")
    constants: dict[str, Any] = {"R": rank, "DR": 64, "BLOCK_DR": 64, "BLOCK_M": tiles.rows, "BLOCK_N": tiles.tokens}
    constants |= dict.fromkeys(("HAS_POSITIONS", "CAUSAL", "WINDOWED", "HAS_UNUSED"), everything)
    constants |= {} if everything else {"positions": None, "unused": None}
    per_token = (rank + 64) * _TYPES[dtype].itemsize + (9 if everything else 0)
    return CompileCase(
        f"latent_decode {dtype} r{rank} dr64 rows{tiles.rows}" + (" masked" if everything else ""),
        _split_kernel,
        pointers | optional | dict.fromkeys((*strides, *numbers), "i32") | {"factor": "fp32"},
        constants,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        aligned=(*pointers, *optional, *strides),
        loop_bytes=tiles.tokens * per_token,
        tensor_cores=dtype != "fp32",
    )
