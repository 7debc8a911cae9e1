"""Absorbed multi-head latent attention by Triton kernels: the launches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.hadamard import rotate
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.page import SideFormat
from hf_kvcache.kernels.reference.hadamard import rotation_signs
from hf_kvcache.kernels.triton import latent_cases
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.configs import Config, architecture, programs_wanted
from hf_kvcache.kernels.triton.device import on_their_device
from hf_kvcache.kernels.triton.latent_configs import MERGED_AT_ONCE, PRECISION, latent_config, page_sides, reads
from hf_kvcache.kernels.triton.latent_kernels import dense_kernel, merge_kernel, pages_kernel
from hf_kvcache.kernels.triton.launch import dense_compute, scoring_arguments
from hf_kvcache.kernels.triton.sides import TRITON_TYPES, level_tables
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.kernels.workspace import scratch

#: Widths of latents that the kernels hold in registers, and the most that rotary keys may have.
RANKS, MOST_ROTARY = (16, 32, 64, 128, 256, 512), 128
#: Tokens of a split, at least: the output that it leaves in float32 takes as many bytes as two latents of 16 bits do
#: for every query.
_LEAST_TOKENS = 256
#: Queries of a sequence that are done at a time: of more, the outputs of the splits would be too large.
_MOST_QUERIES = 4096


def supports(
    query: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    sums: bool,
) -> bool:
    """Whether :func:`latent_attend` can do this: no sums, ranks in :data:`RANKS`, dtypes of 16 or 32 bits."""
    rank, rotary = dense.keys.shape[-1], dense.values.shape[-1]
    dtypes = {query.dtype, dense.keys.dtype, dense.values.dtype}
    if pages is not None:
        dtypes |= {side.dense_dtype for side in pages.layout.sides.values() if side.dense_dtype is not None}
    tensors = [query, dense.keys] + ([dense.values] if rotary else [])
    tensors += [] if visibility.mask is None else [visibility.mask]
    # Rows of more float32 numbers do not fit in the registers of an AMD program.
    too_wide = torch.version.hip is not None and rank > 128 and (torch.float32 in dtypes or len(dtypes) > 1)
    return (
        not sums
        and query.numel() > 0
        and rank in RANKS
        and rotary <= MOST_ROTARY
        and dtypes <= set(TRITON_TYPES)
        and not too_wide
        and all(x.stride(-1) == 1 for x in tensors)
        and (pages is None or pages.key_mean is None)
    )


def supports_projection(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Never: projections are plain matrix products, which torch leaves to cuBLAS."""
    return False


@on_their_device
def latent_attend(
    query: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    sums: bool = False,
) -> Attention:
    """Attention over latents, as :func:`hf_kvcache.kernels.reference.latent_decode.latent_attend` without sums.

    Packed latents enter dot products in half precision where queries are in 16 bits (dense ones and full-precision
    tokens in their own dtype), and sums are in float32.
    """
    step = max(1, _MOST_QUERIES // query.shape[1])
    blocks = [slice(start, min(start + step, query.shape[2])) for start in range(0, query.shape[2], step)]
    parts = [_attend(_Call(query[:, :, b], pages, dense, visibility.part(b), scoring)) for b in blocks]
    if len(parts) == 1:
        return parts[0]
    return Attention(torch.cat([p.output for p in parts], 1), torch.cat([p.log_sum_exp for p in parts], 2))


def compile_cases(architecture: str) -> list[CompileCase]:
    """Specializations for the compile report: the widths of DeepSeek-V2 (r = 512, dr = 64), with 128 and 16 heads."""
    return latent_cases.compile_cases(architecture)


class _Mask(NamedTuple):
    """The mask of a call as arguments of the kernels."""

    tensor: torch.Tensor
    strides: tuple[int, int, int]
    columns: int
    kind: str
    lowest: float


@dataclass
class _Call:
    """One attention call, its sizes, and the arguments that its kernels share."""

    query: torch.Tensor
    pages: Pages | None
    dense: DenseTokens
    visibility: Visibility
    scoring: Scoring

    def __post_init__(self) -> None:
        self.batch, self.heads, self.length, _ = self.query.shape
        self.rank = self.dense.keys.shape[-1]
        self.rows_m = self.heads * self.length
        self.slots = self.dense.keys.shape[2]
        self.columns = 0 if self.pages is None else self.pages.columns
        self.device = self.query.device
        self.arch = architecture(self.device)

    def blocks(self, config: Config) -> int:
        return self.batch * triton.cdiv(self.rows_m, config.block_m)

    def per_split(self, total: int, least: int, config: Config) -> int:
        """The pages or tokens of a split of ``total``, at least ``least``, so that the splits fill the device."""
        return max(least, triton.cdiv(total, triton.cdiv(programs_wanted(self.device), self.blocks(config))))

    def mask(self, unread: torch.Tensor) -> _Mask:
        mask = self.visibility.mask
        if mask is None:
            return _Mask(unread, (0, 0, 0), 0, "none", 0.0)
        strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
        three = strides[0], strides[1], strides[2]
        if mask.dtype == torch.bool:
            return _Mask(mask.view(torch.uint8), three, mask.shape[-1], "bool", 0.0)
        return _Mask(mask, three, mask.shape[-1], "additive", torch.finfo(mask.dtype).min / 2)

    def common(self, mask: _Mask, config: Config) -> dict[str, Any]:
        """The arguments that the kernels over pages and over full-precision tokens share."""
        return {
            "mask_shift": self.visibility.start - self.visibility.mask_start,
            "mask_columns": mask.columns,
            "lowest": mask.lowest,
            "MASK": mask.kind,
            "rows": self.batch,
            "rows_m": self.rows_m,
            "GROUP": self.heads,
            **scoring_arguments(self.visibility, self.scoring),
            "BLOCK_M": config.block_m,
            "STAGES": config.num_stages,
            "num_warps": config.num_warps,
            **config.options,
        }


def _attend(call: _Call) -> Attention:
    page_config, dense_config, per_split = _configs(call)
    page_splits = triton.cdiv(call.columns, per_split)
    step = call.per_split(call.slots, _LEAST_TOKENS, dense_config)
    step = triton.cdiv(step, dense_config.block_n) * dense_config.block_n
    splits = page_splits + triton.cdiv(call.slots, step)
    partial = scratch("triton.partial", (splits, call.batch, call.rows_m, call.rank), torch.float32, call.device)
    lse = scratch("triton.lse", (splits, call.batch, call.rows_m), torch.float32, call.device)
    if page_splits:
        assert call.pages is not None
        _attend_pages(call, call.pages, page_config, per_split, page_splits, partial, lse)
    if call.slots:
        _attend_dense(call, dense_config, step, page_splits, partial, lse)
    return _merge(call, page_splits, splits, partial, lse)


def _configs(call: _Call) -> tuple[Config, Config, int]:
    """The configurations of the kernels over pages and over full-precision tokens, and the pages of a split."""
    compute = dense_compute(call.query.dtype, call.dense.keys.dtype, call.arch)
    dense = latent_config(call.arch, call.rows_m, "singles" if compute == tl.float32 else "tokens")
    if call.pages is None:
        return dense, dense, 1
    layout = call.pages.layout
    pages = latent_config(call.arch, call.rows_m, reads(layout, call.query.dtype, call.arch))
    return pages, dense, call.per_split(call.columns, triton.cdiv(_LEAST_TOKENS, layout.page_size), pages)


def _attend_pages(
    call: _Call,
    pages: Pages,
    config: Config,
    per_split: int,
    splits: int,
    partial: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    latents, rotary = page_sides(pages.layout, call.query.dtype, call.arch)
    formats = pages.layout.sides["keys"], pages.layout.sides["values"]
    query = _rotated(call.query[..., : call.rank], formats[0])
    turned = _rotated(call.query[..., call.rank :], formats[1])
    start = call.visibility.start
    uploaded = torch.from_numpy(np.stack([pages.addresses, pages.counts, pages.first - start]))
    uploaded = uploaded.to(call.device, non_blocking=True)
    placed, positions = 0, uploaded
    held = pages.first[pages.counts > 0]
    if not call.visibility.sees_all(int(held.min()) if held.size else 0):
        placed = 2 if pages.scattered else 1
    if placed == 2:
        positions = (pages.positions(0, pages.columns) - start).int()
    mask = call.mask(partial)
    pages_kernel[call.blocks(config), splits](
        query,
        turned,
        uploaded,
        positions,
        level_tables(formats[0].table, formats[1].table, call.device),
        mask.tensor,
        partial,
        lse,
        *query.stride()[:3],
        *turned.stride()[:3],
        *mask.strides,
        columns=pages.columns,
        per_split=per_split,
        LATENTS=latents,
        ROTARY=rotary,
        BLOCK_N=min(config.block_n, latents.page_pad),
        FULL=pages.full,
        PLACED=placed,
        **call.common(mask, config),
    )


def _rotated(query: torch.Tensor, fmt: SideFormat) -> torch.Tensor:
    return query if fmt.rotation == "none" else rotate(query.float(), fmt)


def _attend_dense(
    call: _Call, config: Config, per_split: int, first_split: int, partial: torch.Tensor, lse: torch.Tensor
) -> None:
    dense = call.dense
    rotary_dim = dense.values.shape[-1]
    positions = partial if dense.positions is None else dense.positions
    unused = partial if dense.unused is None else dense.unused.view(torch.uint8)
    mask = call.mask(partial)
    dense_kernel[call.blocks(config), triton.cdiv(call.slots, per_split)](
        call.query,
        dense.keys,
        dense.values,
        positions,
        unused,
        mask.tensor,
        partial,
        lse,
        *call.query.stride()[:3],
        dense.keys.stride(0),
        dense.keys.stride(2),
        dense.values.stride(0),
        dense.values.stride(2),
        positions.stride(0),
        unused.stride(0),
        *mask.strides,
        slots=call.slots,
        per_split=per_split,
        first_split=first_split,
        start=call.visibility.start,
        R=call.rank,
        DR=rotary_dim,
        DR_PAD=max(16, triton.next_power_of_2(rotary_dim)),
        COMPUTE=dense_compute(call.query.dtype, dense.keys.dtype, call.arch),
        PRECISION=PRECISION,
        BLOCK_N=config.block_n,
        PLACED=dense.positions is not None,
        UNUSED=dense.unused is not None,
        **call.common(mask, config),
    )


def _merge(call: _Call, page_splits: int, splits: int, partial: torch.Tensor, lse: torch.Tensor) -> Attention:
    output = call.query.new_empty(call.batch, call.length, call.heads, call.rank)
    log_sum_exp = torch.empty(call.batch, call.heads, call.length, device=call.device)
    rotation = "none" if call.pages is None else call.pages.layout.sides["keys"].rotation
    sinks = call.scoring.sink_logits
    merge_kernel[call.rows_m, call.batch](
        partial,
        lse,
        _signs(call.rank, call.device) if rotation == "signed_hadamard" else partial,
        partial if sinks is None else sinks.float(),
        output,
        log_sum_exp,
        call.batch,
        call.rows_m,
        page_splits,
        splits,
        R=call.rank,
        LOG_R=call.rank.bit_length() - 1,
        GROUP=call.heads,
        BLOCK_S=MERGED_AT_ONCE,
        ROTATED=rotation != "none",
        SIGNED=rotation == "signed_hadamard",
        SINKS=sinks is not None,
        num_warps=4,
    )
    return Attention(output, log_sum_exp)


@lru_cache(maxsize=16)
def _signs(dim: int, device: torch.device) -> torch.Tensor:
    """The signs of the signed rotation, float32 ``[dim]``."""
    # A cached tensor made under inference_mode could not be used outside it.
    with torch.inference_mode(False):
        return rotation_signs(dim, "signed_hadamard").to(device)
