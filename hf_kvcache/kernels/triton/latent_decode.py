"""Absorbed multi-head latent attention by Triton kernels: the launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.hadamard import rotate
from hf_kvcache.kernels.inputs import Attention, CallInputs, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.page import SideFormat
from hf_kvcache.kernels.triton import latent_cases
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.configs import Config, architecture, programs_wanted
from hf_kvcache.kernels.triton.decoded_pages import columns_at_a_time, decoded_pages
from hf_kvcache.kernels.triton.device import on_their_device
from hf_kvcache.kernels.triton.latent_configs import (
    LEAST_DIM,
    MERGED_AT_ONCE,
    PRECISION,
    decoded_dtypes,
    latent_config,
    page_sides,
    reads,
)
from hf_kvcache.kernels.triton.latent_kernels import dense_kernel, merge_kernel, pages_kernel
from hf_kvcache.kernels.triton.latent_step import LatentPreparedCall, signs, supports_step
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


class PreparedCall(LatentPreparedCall):
    """A plain decode step with both projections, prepared once for many tokens."""

    @staticmethod
    def supports(inputs: CallInputs) -> bool:
        """Whether a call can be prepared for such tokens."""
        slots = DenseTokens(inputs.slots.keys, inputs.slots.values)
        see = Visibility(0, 1, None, 0, True, None)
        return supports_step(inputs) and supports(inputs.query, inputs.pages, slots, see, inputs.scoring, False)


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
    over_pages, over_dense = _page_plan(call), _dense_plan(call)
    splits = over_pages.splits + over_dense.splits
    partial = scratch("triton.partial", (splits, call.batch, call.rows_m, call.rank), torch.float32, call.device)
    lse = scratch("triton.lse", (splits, call.batch, call.rows_m), torch.float32, call.device)
    if call.pages is not None and over_pages.splits:
        _attend_pages(call, call.pages, over_pages, partial, lse)
    if call.slots:
        query, turned = call.query[..., : call.rank], call.query[..., call.rank :]
        _attend_tokens(call, query, turned, call.dense, over_dense, over_pages.splits, partial, lse, False)
    return _merge(call, over_pages.splits, splits, partial, lse)


class _Plan(NamedTuple):
    """How pages or tokens are attended to.

    Attributes:
        config: the configuration of the kernel.
        per_split: pages or tokens of a split.
        splits: number of splits.
        dtypes: of latents and rotary keys, if pages are decoded first.
    """

    config: Config
    per_split: int
    splits: int
    dtypes: tuple[torch.dtype, ...] | None = None


def _page_plan(call: _Call) -> _Plan:
    pages = call.pages
    if pages is None:
        return _Plan(latent_config(call.arch, call.rows_m, "tokens"), 1, 0)
    layout = pages.layout
    dtypes = decoded_dtypes(layout, call.rows_m, call.query.dtype, call.arch)
    if dtypes is not None:
        config = latent_config(call.arch, call.rows_m, "singles" if dtypes[0] == torch.float32 else "tokens")
        return _token_plan(call, config, columns_at_a_time(pages, dtypes) * layout.page_size)._replace(dtypes=dtypes)
    masked = call.visibility.mask is not None
    config = latent_config(call.arch, call.rows_m, reads(layout, call.query.dtype, call.arch), masked)
    per_split = call.per_split(call.columns, triton.cdiv(_LEAST_TOKENS, layout.page_size), config)
    return _Plan(config, per_split, triton.cdiv(call.columns, per_split))


def _dense_plan(call: _Call) -> _Plan:
    compute = dense_compute(call.query.dtype, call.dense.keys.dtype, call.arch)
    config = latent_config(call.arch, call.rows_m, "singles" if compute == tl.float32 else "tokens")
    return _token_plan(call, config, call.slots)


def _token_plan(call: _Call, config: Config, tokens: int) -> _Plan:
    per_split = triton.cdiv(call.per_split(tokens, _LEAST_TOKENS, config), config.block_n) * config.block_n
    return _Plan(config, per_split, triton.cdiv(tokens, per_split))


def _attend_pages(call: _Call, pages: Pages, plan: _Plan, partial: torch.Tensor, lse: torch.Tensor) -> None:
    formats = pages.layout.sides["keys"], pages.layout.sides["values"]
    query = _rotated(call.query[..., : call.rank], formats[0])
    turned = _rotated(call.query[..., call.rank :], formats[1])
    if plan.dtypes is None:
        _read_pages(call, pages, query, turned, plan, partial, lse)
        return
    for part in decoded_pages(pages, call.visibility, plan.dtypes, call.arch):
        _attend_tokens(call, query, turned, part.tokens, plan, 0, partial, lse, part.start > 0)


def _read_pages(
    call: _Call,
    pages: Pages,
    query: torch.Tensor,
    turned: torch.Tensor,
    plan: _Plan,
    partial: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Attend to pages as they are, with both parts of the query in their rotated bases."""
    latents, rotary = page_sides(pages.layout, call.query.dtype, call.arch)
    placed = 0
    held = pages.first[pages.counts > 0]
    if not call.visibility.sees_all(int(held.min()) if held.size else 0):
        placed = 2 if pages.scattered else 1
    table = pages.on_device(positions=placed == 2)
    mask = call.mask(partial)
    pages_kernel[call.blocks(plan.config), plan.splits](
        query,
        turned,
        table.table,
        table.table if table.positions is None else table.positions,
        level_tables(pages.layout.sides["keys"].table, pages.layout.sides["values"].table, call.device),
        mask.tensor,
        partial,
        lse,
        *query.stride()[:3],
        *turned.stride()[:3],
        *mask.strides,
        columns=pages.columns,
        capacity=table.capacity,
        start=call.visibility.start,
        per_split=plan.per_split,
        LATENTS=latents,
        ROTARY=rotary,
        BLOCK_N=min(plan.config.block_n, latents.page_pad),
        FULL=pages.full,
        PLACED=placed,
        **call.common(mask, plan.config),
    )


def _rotated(query: torch.Tensor, fmt: SideFormat) -> torch.Tensor:
    return query if fmt.rotation == "none" else rotate(query.float(), fmt)


def _attend_tokens(
    call: _Call,
    query: torch.Tensor,
    turned: torch.Tensor,
    tokens: DenseTokens,
    plan: _Plan,
    first_split: int,
    partial: torch.Tensor,
    lse: torch.Tensor,
    continued: bool,
) -> None:
    """Attend to tokens in splits from ``first_split`` on, or ``continued``, go on with those of an earlier launch."""
    slots, rotary_dim, config = tokens.keys.shape[2], tokens.values.shape[-1], plan.config
    positions = partial if tokens.positions is None else tokens.positions
    unused = partial if tokens.unused is None else tokens.unused.view(torch.uint8)
    mask = call.mask(partial)
    own = tokens is call.dense
    dense_kernel[call.blocks(config), triton.cdiv(slots, plan.per_split)](
        query,
        turned,
        tokens.keys,
        tokens.values,
        positions,
        unused,
        mask.tensor,
        partial,
        lse,
        *query.stride()[:3],
        *turned.stride()[:3],
        tokens.keys.stride(0),
        tokens.keys.stride(2),
        tokens.values.stride(0),
        tokens.values.stride(2),
        positions.stride(0),
        unused.stride(0),
        *mask.strides,
        slots=slots,
        per_split=plan.per_split,
        first_split=first_split,
        skipped=0,
        start=call.visibility.start,
        R=call.rank,
        DR=rotary_dim,
        DR_PAD=max(LEAST_DIM, triton.next_power_of_2(rotary_dim)),
        COMPUTE=dense_compute(call.query.dtype if own else tokens.keys.dtype, tokens.keys.dtype, call.arch),
        PRECISION=PRECISION,
        BLOCK_N=config.block_n,
        PLACED=tokens.positions is not None,
        UNUSED=tokens.unused is not None,
        CONTINUED=continued,
        **call.common(mask, config),
    )


def _merge(call: _Call, page_splits: int, splits: int, partial: torch.Tensor, lse: torch.Tensor) -> Attention:
    output = call.query.new_empty(call.batch, call.length, call.heads, call.rank)
    log_sum_exp = torch.empty(call.batch, call.heads, call.length, dtype=torch.float32, device=call.device)
    rotation = "none" if call.pages is None else call.pages.layout.sides["keys"].rotation
    sinks = call.scoring.sink_logits
    merge_kernel[call.rows_m, call.batch](
        partial,
        lse,
        signs(call.rank, call.device) if rotation == "signed_hadamard" else partial,
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
