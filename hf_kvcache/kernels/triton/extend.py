"""Attention of a long block of new queries by Triton kernels.

Where assembly decodes pages with their scales, the kernel over pages of ``decode`` reads them with large blocks of
queries. Elsewhere, packed pages that many blocks of queries read are decoded once, part by part, and then read as
full-precision tokens. Few blocks of queries, and pages that hold full-precision elements, are read as in ``decode``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.column_sums import column_sums
from hf_kvcache.kernels.hadamard import rotate
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.triton import extend_cases, launch
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.configs import Config, dot_precision, programs_wanted
from hf_kvcache.kernels.triton.decoded_pages import columns_at_a_time, decoded_pages
from hf_kvcache.kernels.triton.device import on_their_device
from hf_kvcache.kernels.triton.extend_configs import MOST_SINGLE_DIM, extend_config, extend_pages_config
from hf_kvcache.kernels.triton.extend_kernels import tokens_kernel
from hf_kvcache.kernels.triton.sides import TRITON_TYPES
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.kernels.workspace import scratch

#: Elements of partial outputs of a split at a time; a longer block of queries is cut.
_MOST_ELEMENTS = 1 << 26
#: Blocks of queries of a row from which on pages are decoded first, where blocks are small.
_LEAST_BLOCKS = 3
#: The same where a block is large, and pages are smaller than what the kernel over pages computes at a time.
_LEAST_LARGE_BLOCKS = 4
#: Tokens of a split, at least.
_LEAST_TOKENS = 512


def supports(query: torch.Tensor, pages: Pages | None, dense: DenseTokens, visibility: Visibility) -> bool:
    """Whether :func:`attend` can do a call: any number of query tokens, no mask, head dimensions from 16 to 256."""
    return launch.can_attend(query, pages, dense, visibility)


@on_their_device
def attend(
    query: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    sums: bool = False,
) -> Attention:
    """Attention of many new queries, as :func:`hf_kvcache.kernels.reference.decode.attend`.

    The last full-precision tokens are those of the queries. Under causality, a query reads none behind its own token.
    Beside its result, a call takes memory for partial outputs of at most ``_MOST_ELEMENTS`` elements a split, and for
    decoded pages (:data:`~hf_kvcache.kernels.triton.decoded_pages.SCRATCH_BYTES`). Sums of probabilities are computed
    in a second pass, so that no matrix of queries times keys is held.
    """
    batch, query_heads, length, _ = query.shape
    slots = dense.keys.shape[2]
    block = max(1, _MOST_ELEMENTS // (batch * query_heads * dense.values.shape[-1]))
    parts = []
    for start in range(0, length, block):
        queries = slice(start, min(start + block, length))
        seen = max(0, slots - (length - queries.stop)) if visibility.causal else slots
        parts.append(_attend(query[:, :, queries], pages, dense.until(seen), visibility.part(queries), scoring))
    result = parts[0]
    if len(parts) > 1:
        output, log_sum_exp = torch.cat([p.output for p in parts], 1), torch.cat([p.log_sum_exp for p in parts], 2)
        result = Attention(output, log_sum_exp)
    if sums:
        page_sums, dense_sums = column_sums(query, result.log_sum_exp, pages, dense, visibility, scoring)
        result = result._replace(page_sums=page_sums, dense_sums=dense_sums)
    return result


def compile_cases(architecture: str) -> list[CompileCase]:
    """Specializations of a long block of queries for the compile report."""
    return extend_cases.compile_cases(architecture)


def _attend(
    query: torch.Tensor, pages: Pages | None, dense: DenseTokens, visibility: Visibility, scoring: Scoring
) -> Attention:
    call = launch.Call(query, pages, dense, visibility, scoring, False)
    if pages is None:
        return launch.attend(query, pages, dense, visibility, scoring, False, own_last=True)
    masked = not pages.full or visibility.window is not None or scoring.softcap is not None or pages.layout.biased
    config = extend_pages_config(pages.layout, call.arch, call.rows_m, query.dtype, masked)
    if not _decodes_first(call, pages, config):
        return launch.attend(query, pages, dense, visibility, scoring, False, own_last=True, page_config=config)
    single = query.dtype == torch.float32
    dtypes = (torch.float32, torch.float32) if single else (torch.float16, torch.float16)
    over_pages = _plan(call, columns_at_a_time(pages, dtypes) * pages.layout.page_size, dtypes[0])
    exact = launch.dense_compute(query.dtype, dense.keys.dtype, call.arch) == tl.float32
    over_dense = _plan(call, call.slots, torch.float32 if exact else query.dtype)
    splits = over_pages.splits + over_dense.splits
    partial = scratch("triton.partial", (splits, call.rows, call.rows_m, call.value_dim), torch.float32, call.device)
    lse = scratch("triton.lse", (splits, call.rows, call.rows_m), torch.float32, call.device)
    fmt, scaled = pages.layout.sides["keys"], pages.scale_queries(query)
    rotated = scaled if fmt.rotation == "none" else rotate(scaled.float(), fmt)
    by_row = rotated.reshape(call.rows, call.group, call.length, -1)
    for part in decoded_pages(pages, visibility, dtypes, call.arch):
        _launch(call, by_row, part.tokens, over_pages, 0, partial, lse, part.start > 0)
    if call.slots:
        _launch(call, query, dense, over_dense, over_pages.splits, partial, lse, False)
    return Attention(*launch.combine(call, over_pages.splits, splits, partial, lse))


def _decodes_first(call: launch.Call, pages: Pages, config: Config | None) -> bool:
    """Whether pages are decoded first; ``config`` is that of a kernel that decodes them as it reads them."""
    codes, dim = launch.codes_of(pages.layout), max(call.query.shape[-1], call.value_dim)
    if codes is None or pages.columns == 0 or pages.layout.biased:
        return False  # the kernel over decoded tokens knows no bias
    if call.query.dtype == torch.float32 and dim > MOST_SINGLE_DIM:
        return False
    if config is None:
        return triton.cdiv(call.rows_m, call.config(dim, codes).block_m) >= _LEAST_BLOCKS
    small = triton.next_power_of_2(pages.layout.page_size) < config.block_n
    return small and triton.cdiv(call.rows_m, config.block_m) >= _LEAST_LARGE_BLOCKS


class _Plan(NamedTuple):
    """How tokens are attended to: the configuration, and the splits of as many of them as there are at a time."""

    config: Config
    splits: int


def _plan(call: launch.Call, tokens: int, dtype: torch.dtype) -> _Plan:
    config = extend_config(call.arch, max(call.query.shape[-1], call.value_dim), call.rows_m, dtype)
    wanted = max(1, programs_wanted(call.device) // 2 // call.blocks(config.block_m))
    most = triton.cdiv(tokens, _per_split(tokens, min(wanted, max(1, tokens // _LEAST_TOKENS)), config))
    return _Plan(config, most)


def _per_split(tokens: int, splits: int, config: Config) -> int:
    return max(1, triton.cdiv(triton.cdiv(tokens, splits), config.block_n)) * config.block_n


def _launch(
    call: launch.Call,
    query: torch.Tensor,
    tokens: DenseTokens,
    plan: _Plan,
    first_split: int,
    partial: torch.Tensor,
    lse: torch.Tensor,
    continued: bool,
) -> None:
    """Attend to tokens in splits from ``first_split`` on, or ``continued``, go on with those of an earlier launch."""
    slots, key_dim, value_dim = tokens.keys.shape[2], tokens.keys.shape[-1], tokens.values.shape[-1]
    config, own = plan.config, tokens is call.dense
    per_split = _per_split(slots, plan.splits, config)
    positions = partial if tokens.positions is None else tokens.positions
    unused = partial if tokens.unused is None else tokens.unused.view(torch.uint8)
    tokens_kernel[call.blocks(config.block_m), triton.cdiv(slots, per_split)](
        query,
        tokens.keys,
        tokens.values,
        positions,
        unused,
        partial,
        lse,
        *query.stride()[:3],
        *tokens.keys.stride()[:3],
        *tokens.values.stride()[:3],
        positions.stride(0),
        unused.stride(0),
        rows=call.rows,
        slots=slots,
        per_split=per_split,
        rows_m=call.rows_m,
        heads=tokens.keys.shape[1],
        first_split=first_split,
        start=call.visibility.start,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_PAD=triton.next_power_of_2(key_dim),
        VALUE_PAD=triton.next_power_of_2(value_dim),
        COMPUTE=_compute(call, tokens),
        PRECISION=dot_precision(call.arch),
        GROUP=call.group,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        STAGES=config.num_stages,
        PLACED=tokens.positions is not None,
        UNUSED=tokens.unused is not None,
        OWN_LAST=own and tokens.positions is not None and call.visibility.causal,
        CONTINUED=continued,
        PRODUCTS=launch.weighs_products(call.scoring, config.block_m, False, call.sums),
        num_warps=config.num_warps,
        **config.options,
        **launch.scoring_arguments(call.visibility, call.scoring),
    )


def _compute(call: launch.Call, tokens: DenseTokens) -> Any:
    """The type in which dot products take tokens: decoded ones in their own."""
    if tokens is call.dense:
        return launch.dense_compute(call.query.dtype, tokens.keys.dtype, call.arch)
    return TRITON_TYPES[tokens.keys.dtype]
