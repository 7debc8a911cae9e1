"""Launches of the Triton attention kernels, for ``decode`` and ``extend``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.hadamard import rotate, rotation_matrix
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.page import PageLayout
from hf_kvcache.kernels.triton.attention_kernels import combine_kernel, dense_kernel, pages_kernel, sums_kernel
from hf_kvcache.kernels.triton.configs import (
    Codes,
    Config,
    architecture,
    attention_config,
    dot_precision,
    page_stages,
    programs_wanted,
    single_precision,
)
from hf_kvcache.kernels.triton.sides import TRITON_TYPES, Side, describe_side, level_tables
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.kernels.workspace import scratch

#: Elements of a block of queries up to which scales are folded: those per channel into the queries, of which a scaled
#: copy of more would spill, and those per token into scores and weights. For more queries it takes fewer instructions
#: to scale the tokens themselves, where assembly does it.
_MOST_FOLDED_ELEMENTS = 4096
#: Queries of a program from which on scores are not made where products do. For fewer, other work takes the time.
_LEAST_PRODUCTS = 128
#: Pages and full-precision tokens of a split, at least.
_LEAST_PAGES, _LEAST_TOKENS = 2, 128
#: Widths that the kernels' registers hold.
_LEAST_DIM, _MOST_DIM = 16, 256
_COMBINE_QUERIES = 16


def can_attend(query: torch.Tensor, pages: Pages | None, dense: DenseTokens, visibility: Visibility) -> bool:
    """Whether the kernels can do a call: no mask, dtypes of 16 or 32 bits, head dimensions from 16 to 256."""
    if visibility.mask is not None:
        return False
    tensors = (query, dense.keys, dense.values)
    dtypes, dims = {x.dtype for x in tensors}, {x.shape[-1] for x in tensors}
    if pages is not None:
        sides = pages.layout.sides.values()
        dtypes |= {side.dense_dtype for side in sides if side.dense_dtype is not None}
        dims |= {side.dim for side in sides}
    contiguous = all(x.stride(-1) == 1 for x in tensors)
    return contiguous and dtypes <= set(TRITON_TYPES) and min(dims) >= _LEAST_DIM and max(dims) <= _MOST_DIM


def page_sides(layout: PageLayout, dtype: torch.dtype, block_m: int, arch: str) -> tuple[Side, Side]:
    """Compile-time descriptions of both sides of pages, for queries of ``dtype``."""
    sides = []
    for name, fmt in layout.sides.items():
        compute = tl.float32 if dtype == torch.float32 else tl.float16
        if fmt.dense_dtype is not None:
            compute = dense_compute(dtype, fmt.dense_dtype, arch)
        few = block_m * fmt.dim <= _MOST_FOLDED_ELEMENTS
        foldable = few or name == "values" or fmt.axis == "token"
        side = describe_side(layout, name, compute, few, dot_precision(arch), weighed=name == "values")
        if foldable and not few and not side.scaling:
            side = describe_side(layout, name, compute, True, dot_precision(arch), weighed=name == "values")
        sides.append(side)
    return sides[0], sides[1]


def codes_of(layout: PageLayout) -> Codes | None:
    """The kind of codes in pages; None if both sides are full-precision elements."""
    coded = [fmt for fmt in layout.sides.values() if fmt.level != "dense"]
    return Codes(min(fmt.bits for fmt in coded), any(fmt.level == "table" for fmt in coded)) if coded else None


def dense_compute(query: torch.dtype, stored: torch.dtype, arch: str) -> Any:
    """The Triton type in which dot products take full-precision tokens."""
    if query != stored or (arch == "cpu" and stored == torch.bfloat16):  # the interpreter computes these wrongly
        return tl.float32
    return TRITON_TYPES[stored]


def scoring_arguments(visibility: Visibility, scoring: Scoring) -> dict[str, Any]:
    """The arguments of the kernels that say how scores are made and which keys a query sees."""
    return {
        "window": visibility.window or 0,
        "inner": scoring.inner,
        "softcap": scoring.softcap or 0.0,
        "CAUSAL": visibility.causal,
        "WINDOW": visibility.window is not None,
        "SOFTCAP": scoring.softcap is not None,
    }


@dataclass
class Call:
    """One attention call, its sizes, and the arguments that its kernels share, in ``decode`` and in ``extend``."""

    query: torch.Tensor
    pages: Pages | None
    dense: DenseTokens
    visibility: Visibility
    scoring: Scoring
    sums: bool

    def __post_init__(self) -> None:
        self.batch, self.query_heads, self.length, _ = self.query.shape
        self.heads = self.dense.keys.shape[1]
        self.rows = self.batch * self.heads
        self.group = self.query_heads // self.heads
        self.rows_m = self.group * self.length
        self.columns = 0 if self.pages is None else self.pages.columns
        self.slots = self.dense.keys.shape[2]
        self.value_dim = self.dense.values.shape[-1]
        self.device = self.query.device
        self.arch = architecture(self.device)

    def config(self, dim: int, codes: Codes | None) -> Config:
        config = attention_config(self.arch, dim, self.rows_m, codes)
        interpreted = self.arch == "cpu"
        return single_precision(config, dim) if self.query.dtype == torch.float32 and not interpreted else config

    def blocks(self, block_m: int) -> int:
        return self.rows * triton.cdiv(self.rows_m, block_m)

    def per_split(self, total: int, least: int, block_m: int) -> int:
        """The pages or tokens of a split of ``total``, at least ``least``, so that the splits fill the device."""
        splits = triton.cdiv(programs_wanted(self.device), self.blocks(block_m))
        return max(least, triton.cdiv(total, splits))

    def scores(self, tag: str, keys: int) -> torch.Tensor:
        shape = (self.rows, self.rows_m, keys) if self.sums else (0,)
        return scratch(f"triton.{tag}", shape, torch.float32, self.device)

    @property
    def common(self) -> dict[str, Any]:
        """The arguments that the kernels over pages and over full-precision tokens share."""
        return {
            "rows": self.rows,
            "rows_m": self.rows_m,
            "heads": self.heads,
            "GROUP": self.group,
            "KEEP_SCORES": self.sums,
            **scoring_arguments(self.visibility, self.scoring),
        }


def attend(
    query: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    sums: bool,
    own_last: bool,
    page_config: Config | None = None,
) -> Attention:
    """Attention of all queries at once; see :func:`hf_kvcache.kernels.reference.decode.attend`.

    Args:
        own_last: whether the last full-precision tokens are those of the queries, one each.
        page_config: the configuration of the kernel over pages for large blocks of queries; None for the usual one.
    """
    call = Call(query, pages, dense, visibility, scoring, sums)
    page_config, dense_config, page_tokens = _configs(call, page_config)
    page_splits = triton.cdiv(call.columns, page_tokens) if call.columns else 0
    step = triton.next_power_of_2(call.per_split(call.slots, _LEAST_TOKENS, dense_config.block_m))
    splits = page_splits + triton.cdiv(call.slots, step)
    partial = scratch("triton.partial", (splits, call.rows, call.rows_m, call.value_dim), torch.float32, call.device)
    lse = scratch("triton.lse", (splits, call.rows, call.rows_m), torch.float32, call.device)
    page_scores = dense_scores = None
    if page_splits:
        assert pages is not None
        page_scores = call.scores("page_scores", call.columns * pages.layout.page_size)
        _attend_pages(call, pages, page_config, page_tokens, page_splits, partial, lse, page_scores)
    if call.slots:
        dense_scores = call.scores("dense_scores", call.slots)
        _attend_dense(call, dense_config, step, page_splits, own_last, partial, lse, dense_scores)
    output, log_sum_exp = combine(call, page_splits, splits, partial, lse)
    return Attention(output, log_sum_exp, _sums(call, page_scores, log_sum_exp), _sums(call, dense_scores, log_sum_exp))


def _configs(call: Call, pages: Config | None) -> tuple[Config, Config, int]:
    """The configurations of the kernels over pages and over full-precision tokens, and the pages of a split."""
    dim = max(call.query.shape[-1], call.value_dim)
    dense = call.config(dim, None)
    if call.pages is None:
        return dense, dense, 1
    if pages is not None:
        # One program of so many queries fills a multiprocessor, and a split costs as many partial results.
        splits = max(1, programs_wanted(call.device) // 2 // call.blocks(pages.block_m))
        return pages, dense, max(_LEAST_PAGES, triton.cdiv(call.columns, splits))
    pages = call.config(dim, codes_of(call.pages.layout))
    return pages, dense, call.per_split(call.columns, _LEAST_PAGES, pages.block_m)


def _attend_pages(
    call: Call,
    pages: Pages,
    config: Config,
    per_split: int,
    splits: int,
    partial: torch.Tensor,
    lse: torch.Tensor,
    kept_scores: torch.Tensor,
) -> None:
    keys, values = page_sides(pages.layout, call.query.dtype, config.block_m, call.arch)
    fmt = pages.layout.sides["keys"]
    query = pages.scale_queries(call.query)
    query = query if fmt.rotation == "none" else rotate(query.float(), fmt)
    placed = page_placement(pages, call.visibility)
    table = pages.on_device(positions=placed == 2)
    block_n = min(config.block_n, keys.page_pad)
    unfolded = not (keys.folded or values.folded)
    pages_kernel[call.blocks(config.block_m), splits](
        query,
        table.table,
        table.table if table.positions is None else table.positions,
        partial if pages.key_mean is None else pages.key_mean,
        level_tables(fmt.table, pages.layout.sides["values"].table, call.device),
        partial,
        lse,
        kept_scores,
        *query.stride()[:3],
        columns=pages.columns,
        capacity=table.capacity,
        start=call.visibility.start,
        per_split=per_split,
        KEYS=keys,
        VALUES=values,
        BLOCK_M=config.block_m,
        BLOCK_N=block_n,
        STAGES=page_stages(config, codes_of(pages.layout)),
        FULL=pages.full,
        PLACED=placed,
        CENTERED=pages.key_mean is not None,
        PRODUCTS=unfolded and weighs_products(call.scoring, config.block_m, pages.layout.biased, call.sums),
        num_warps=config.num_warps,
        **config.options,
        **call.common,
    )


def weighs_products(scoring: Scoring, block_m: int, biased: bool, sums: bool) -> bool:
    """Whether weights are made of dot products without scores: for large blocks of queries, where it can be done."""
    plain = scoring.inner > 0 and scoring.softcap is None and not biased and not sums
    return plain and block_m >= _LEAST_PRODUCTS


def page_placement(pages: Pages, visibility: Visibility) -> int:
    """How kernels learn which tokens of pages a query sees: ``PLACED`` of :func:`pages_kernel`."""
    if visibility.window is None:
        return 0
    held = pages.first[pages.counts > 0]
    if visibility.sees_all(int(held.min()) if held.size else 0):
        return 0
    return 2 if pages.scattered else 1


def _attend_dense(
    call: Call,
    config: Config,
    per_split: int,
    first_split: int,
    own_last: bool,
    partial: torch.Tensor,
    lse: torch.Tensor,
    kept_scores: torch.Tensor,
) -> None:
    dense = call.dense
    key_dim, value_dim = dense.keys.shape[-1], call.value_dim
    placed = dense.positions is not None
    positions = partial if dense.positions is None else dense.positions
    unused = partial if dense.unused is None else dense.unused.view(torch.uint8)
    dense_kernel[call.blocks(config.block_m), triton.cdiv(call.slots, per_split)](
        call.query,
        dense.keys,
        dense.values,
        positions,
        unused,
        partial,
        lse,
        kept_scores,
        *call.query.stride()[:3],
        *dense.keys.stride()[:3],
        *dense.values.stride()[:3],
        positions.stride(0),
        unused.stride(0),
        slots=call.slots,
        per_split=per_split,
        first_split=first_split,
        start=call.visibility.start,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_PAD=triton.next_power_of_2(key_dim),
        VALUE_PAD=triton.next_power_of_2(value_dim),
        COMPUTE=dense_compute(call.query.dtype, dense.keys.dtype, call.arch),
        PRECISION=dot_precision(call.arch),
        BLOCK_M=config.block_m,
        BLOCK_N=min(config.block_n, per_split),
        STAGES=config.num_stages,
        PLACED=placed,
        UNUSED=dense.unused is not None,
        OWN_LAST=own_last and placed and call.visibility.causal and not call.sums,
        num_warps=config.num_warps,
        **config.options,
        **call.common,
    )


def combine(
    call: Call, page_splits: int, splits: int, partial: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp from partial results, of which the first ``page_splits`` are in the rotated basis."""
    output = call.query.new_empty(call.batch, call.length, call.query_heads, call.value_dim)
    log_sum_exp = torch.empty(call.batch, call.query_heads, call.length, dtype=torch.float32, device=call.device)
    rotation = None
    if page_splits:
        assert call.pages is not None
        fmt = call.pages.layout.sides["values"]
        rotation = rotation_matrix(fmt.dim, fmt.rotation, torch.float32, call.device)
    sinks = call.scoring.sink_logits
    dim_pad = triton.next_power_of_2(call.value_dim)
    chunk, warps = combine_shape(dim_pad)
    combine_kernel[(call.blocks(_COMBINE_QUERIES),)](
        partial,
        lse,
        partial if rotation is None else rotation,
        partial if sinks is None else sinks.float(),
        output,
        log_sum_exp,
        call.rows,
        call.rows_m,
        call.heads,
        page_splits,
        splits,
        DIM=call.value_dim,
        DIM_PAD=dim_pad,
        CHUNK=dim_pad if rotation is None else chunk,
        GROUP=call.group,
        BLOCK_M=_COMBINE_QUERIES,
        ROTATED=rotation is not None,
        SINKS=sinks is not None,
        PRECISION=dot_precision(call.arch),
        num_warps=warps,
    )
    return output, log_sum_exp


def combine_shape(dim_pad: int) -> tuple[int, int]:
    """The channels that ``combine_kernel`` rotates back at a time, and its warps."""
    return min(dim_pad, 32), 4 if dim_pad <= 128 else 8


def sums_shape(arch: str) -> tuple[int, int]:
    """The keys of a program of ``sums_kernel``, so many that each thread loads 16 bytes at once, and its warps."""
    return 512, 2 if arch.startswith("gfx") else 4


def _sums(call: Call, scores: torch.Tensor | None, log_sum_exp: torch.Tensor) -> torch.Tensor | None:
    if not call.sums or scores is None:
        return None
    keys = scores.shape[-1]
    sums = torch.empty(call.batch, call.query_heads, keys, dtype=torch.float32, device=call.device)
    block_n, warps = sums_shape(call.arch)
    grid = call.batch * call.query_heads, triton.cdiv(keys, block_n)
    sums_kernel[grid](scores, log_sum_exp, sums, call.rows_m, keys, GROUP=call.group, BLOCK_N=block_n, num_warps=warps)
    return sums
