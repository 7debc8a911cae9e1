"""The probability of each key, summed over the queries, by a Triton kernel.

A program holds a tile of keys and runs over the queries that see it.

Only sums are written, each by one program in a fixed order, so results do not vary from run to run. Pages are decoded,
a few thousand keys at a time, and then read as full-precision keys. Column sums are for hundreds of queries a key, for
which decoding is a small part of the work.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.hadamard import rotate
from hf_kvcache.kernels.inputs import DenseTokens, Pages, Scoring
from hf_kvcache.kernels.pack import decode_side
from hf_kvcache.kernels.page import BIAS
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.device import on_their_device
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.kernels.workspace import scratch

LOG2_E = tl.constexpr(1.4426950408889634)
#: Larger than any position.
FAR = tl.constexpr(1 << 30)
#: Keys of each row that are decoded at a time.
DECODED_TOKENS = 4096


@triton.jit
def _sums_kernel(
    # Queries.
    query,
    log_sum_exp,
    shift,
    # Keys.
    keys,
    positions,
    unused,
    bias,
    # Output.
    sums,
    # Strides.
    key_batch,
    key_head,
    key_token,
    position_batch,
    position_head,
    sums_row,
    # Sizes and scoring.
    factor,
    softcap,
    tokens,
    start,
    length,
    window,
    ratio,
    # Constant sizes.
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    # Switches.
    HAS_SHIFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_UNUSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """The sums of ``BLOCK_N`` keys for one query head of one sequence; grid (key blocks, query heads, sequences).

    Args:
        query: ``[B, Hq, length, D]``, contiguous.
        log_sum_exp: fp32 ``[B, Hq, length]``.
        shift: fp32 ``[B, Hq, length]``, what the key mean adds to the dot products; read if ``HAS_SHIFT``.
        keys: ``[B, Hkv, tokens, D]``; the last dimension is contiguous.
        positions: int64 ``[B, tokens]`` or ``[B, Hkv, tokens]``; read if ``HAS_POSITIONS``.
        unused: of the shape of the positions, True where there is no token; read if ``HAS_UNUSED``.
        bias: of the shape of the positions, added to the scores of each key behind a soft cap; read if ``HAS_BIAS``.
        sums: fp32 ``[B, Hq, tokens]``, written.
        factor: factor of the dot products; scores are in base 2.
        start: position of the first query.
        ratio: query heads per KV head.
    """
    query_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = (query_head // ratio).to(tl.int64)
    row = batch * tl.num_programs(1) + query_head
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_D)
    held = token < tokens
    at_token = token.to(tl.int64)
    key = tl.load(
        keys + batch * key_batch + head * key_head + at_token[:, None] * key_token + channel[None, :],
        mask=held[:, None] & (channel[None, :] < D),
        other=0.0,
    )
    at_side = batch * position_batch + head * position_head + at_token
    if HAS_UNUSED:
        held = held & (tl.load(unused + at_side, mask=held, other=1) == 0)
    if HAS_BIAS:
        added = tl.load(bias + at_side, mask=held, other=0.0).to(tl.float32) * LOG2_E
    first, stop = 0, length
    if HAS_POSITIONS:
        position = tl.load(positions + at_side, mask=held, other=0).to(tl.int32)
        if CAUSAL:
            # Queries before the first of these tokens see none of them.
            first = tl.maximum(tl.min(tl.where(held, position, FAR), 0) - start, 0) // BLOCK_M * BLOCK_M
        if WINDOWED:
            stop = tl.minimum(length, tl.max(tl.where(held, position, -FAR), 0) + window - start)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(first, stop, BLOCK_M):
        index = block + tl.arange(0, BLOCK_M)
        inside = index < length
        at = row * length + index
        vectors = tl.load(
            query + at[:, None] * D + channel[None, :], mask=inside[:, None] & (channel[None, :] < D), other=0.0
        )
        scores = tl.dot(key, tl.trans(vectors), input_precision="ieee")
        if HAS_SHIFT:
            scores += tl.load(shift + at, mask=inside, other=0.0)[None, :]
        if HAS_SOFTCAP:
            # tanh from the exponential, in a form that does not overflow
            scores = softcap * LOG2_E - softcap * LOG2_E * 2.0 / (tl.exp2(scores * factor * 2.0) + 1.0)
        else:
            scores *= factor
        if HAS_BIAS:
            scores += added[:, None]
        scores -= tl.load(log_sum_exp + at, mask=inside, other=0.0)[None, :] * LOG2_E
        seen = held[:, None] & inside[None, :]
        if HAS_POSITIONS:
            if CAUSAL:
                seen = seen & (position[:, None] <= start + index[None, :])
            if WINDOWED:
                seen = seen & (position[:, None] > start + index[None, :] - window)
        total += tl.where(seen, tl.exp2(scores), 0.0)
    tl.store(sums + row * sums_row + at_token, tl.sum(total, 1), mask=token < tokens)


class _Tiles(NamedTuple):
    """The queries and keys that a program computes at a time, its warps and its pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


def _tiles(dtype: torch.dtype, block_dim: int, hip: bool) -> _Tiles:
    if dtype == torch.float32:
        return _Tiles(32, 32, 4, 1 if hip else 2)
    if hip:
        return _Tiles(32, 64, 4, 1)
    return _Tiles(64 if block_dim <= 128 else 32, 64, 4, 2)


def supports(query: torch.Tensor, pages: Pages | None, dense: DenseTokens, visibility: Visibility) -> bool:
    """Whether :func:`column_sums` can do a call. The reference does all others."""
    return (
        visibility.mask is None
        and query.dtype == dense.keys.dtype
        and query.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and query.shape[-1] <= 256
        and query.numel() > 0
        and dense.keys.stride(-1) == 1
    )


@on_their_device
def column_sums(
    query: torch.Tensor,
    log_sum_exp: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """As :func:`hf_kvcache.kernels.reference.column_sums.column_sums`, of one dtype and without a mask."""
    log_sum_exp = log_sum_exp.contiguous()
    page_sums = None if pages is None else _page_sums(query, log_sum_exp, pages, visibility, scoring)
    sums = log_sum_exp.new_empty(*query.shape[:2], dense.keys.shape[2])
    _launch(query.contiguous(), log_sum_exp, None, dense, None, visibility, scoring, sums)
    return page_sums, sums


def _page_sums(
    query: torch.Tensor, log_sum_exp: torch.Tensor, pages: Pages, visibility: Visibility, scoring: Scoring
) -> torch.Tensor:
    layout, heads = pages.layout, pages.heads
    keys = layout.sides["keys"]
    batch, query_heads, length, _ = query.shape
    rotated = rotate(pages.scale_queries(query.float()), keys)
    shift = None
    if pages.key_mean is not None:
        # The mean that was subtracted from the packed keys changes all scores of a query alike.
        grouped = rotated.reshape(batch * heads, -1, keys.dim)
        shift = (grouped @ pages.key_mean.unsqueeze(-1)).reshape(batch, query_heads, length)
    rotated = rotated.to(query.dtype).contiguous()
    sums = log_sum_exp.new_empty(batch, query_heads, pages.columns * layout.page_size)
    step = max(1, DECODED_TOKENS // layout.page_size)
    for start in range(0, pages.columns, step):
        stop = min(start + step, pages.columns)
        tokens, bias = _decoded(pages, start, stop, query.dtype)
        part = sums[:, :, start * layout.page_size : stop * layout.page_size]
        _launch(rotated, log_sum_exp, shift, tokens, bias, visibility, scoring, part)
    return sums


def _decoded(pages: Pages, start: int, stop: int, dtype: torch.dtype) -> tuple[DenseTokens, torch.Tensor | None]:
    """The keys of some columns in the rotated basis, and their bias if they have one.

    Positions, unused places and the bias are ``[B, Hkv, n]``, of each head.
    """
    layout, records = pages.layout, pages.records(start, stop)
    shape = (stop - start, pages.rows, layout.page_size, layout.sides["keys"].dim)
    buffer = scratch("keys", shape, torch.float32, pages.device)
    decoded = decode_side(layout, "keys", records, buffer)
    rows = decoded.to(dtype).transpose(0, 1).reshape(-1, pages.heads, (stop - start) * layout.page_size, shape[-1])
    unused, bias = pages.unused(start, stop), layout.view(records, BIAS)
    tokens = DenseTokens(
        rows,
        rows,
        pages.positions(start, stop).view(rows.shape[:3]),
        None if unused is None else unused.view(rows.shape[:3]),
    )
    return tokens, None if bias is None else bias.transpose(0, 1).reshape(rows.shape[:3])


def _launch(
    query: torch.Tensor,
    log_sum_exp: torch.Tensor,
    shift: torch.Tensor | None,
    tokens: DenseTokens,
    bias: torch.Tensor | None,
    visibility: Visibility,
    scoring: Scoring,
    sums: torch.Tensor,
) -> None:
    """Fill ``sums [B, Hq, n]`` for keys whose positions are ``[B, n]``, or ``[B, Hkv, n]`` of each head.

    The ``bias`` of keys is ``[B, Hkv, n]``; only keys with positions of each head may have one.
    """
    batch, query_heads, length, dim = query.shape
    heads, count = tokens.keys.shape[1:3]
    if not count:
        return
    block_dim = max(16, triton.next_power_of_2(dim))
    tiles = _tiles(query.dtype, block_dim, torch.version.hip is not None)
    per_head = tokens.positions is not None and tokens.positions.dim() == 3
    side = count if per_head else 0
    _sums_kernel[(triton.cdiv(count, tiles.keys), query_heads, batch)](
        query,
        log_sum_exp,
        shift,
        tokens.keys,
        None if tokens.positions is None else tokens.positions.contiguous(),
        None if tokens.unused is None else tokens.unused.contiguous(),
        None if bias is None else bias.contiguous(),
        sums,
        *tokens.keys.stride()[:3],
        side * heads if per_head else count,
        side,
        sums.stride(1),
        scoring.inner * LOG2_E.value,
        scoring.softcap or 0.0,
        count,
        visibility.start,
        length,
        visibility.window or 0,
        query_heads // heads,
        D=dim,
        BLOCK_D=block_dim,
        BLOCK_M=tiles.queries,
        BLOCK_N=tiles.keys,
        HAS_SHIFT=shift is not None,
        HAS_SOFTCAP=scoring.softcap is not None,
        HAS_POSITIONS=tokens.positions is not None,
        HAS_UNUSED=tokens.unused is not None,
        HAS_BIAS=bias is not None,
        CAUSAL=visibility.causal,
        WINDOWED=visibility.window is not None,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


_TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def compile_cases(architecture: str) -> list[CompileCase]:
    """A causal prefill, the same over keys with a bias, and everything else at once."""
    hip = architecture.startswith("gfx")
    return [
        _case(128, "bf16", hip, False),
        _case(128, "bf16", hip, False, biased=True),
        _case(64, "bf16", hip, True),
        _case(256, "bf16", hip, True),
        _case(64, "fp32", hip, True),
    ]


def _case(dim: int, dtype: str, hip: bool, everything: bool, biased: bool = False) -> CompileCase:
    tiles = _tiles(_TYPES[dtype], dim, hip)
    pointers = {"query": f"*{dtype}", "log_sum_exp": "*fp32", "keys": f"*{dtype}", "positions": "*i64", "sums": "*fp32"}
    strides = ("key_batch", "key_head", "key_token", "position_batch", "position_head")
    numbers = ("tokens", "start", "length", "window", "ratio", "sums_row")
    constants: dict[str, Any] = {"D": dim, "BLOCK_D": dim, "BLOCK_M": tiles.queries, "BLOCK_N": tiles.keys}
    constants |= {"HAS_POSITIONS": True, "CAUSAL": True, "HAS_BIAS": biased}
    constants |= dict.fromkeys(("HAS_SHIFT", "HAS_SOFTCAP", "HAS_UNUSED", "WINDOWED"), everything)
    if everything:
        pointers |= {"shift": "*fp32", "unused": "*i1"}
    else:
        constants |= {"shift": None, "unused": None}
    if biased:
        pointers["bias"] = "*fp16"
    else:
        constants["bias"] = None
    per_query = dim * _TYPES[dtype].itemsize + (8 if everything else 4)
    return CompileCase(
        f"column_sums {dtype} d{dim}" + (" everything" if everything else " bias" if biased else ""),
        _sums_kernel,
        pointers | dict.fromkeys((*strides, *numbers), "i32") | dict.fromkeys(("factor", "softcap"), "fp32"),
        constants,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        aligned=(*pointers, *strides),
        loop_bytes=tiles.queries * per_query,
        tensor_cores=dtype != "fp32",
    )
