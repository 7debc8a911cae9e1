"""Attention of a long block of new queries by the Triton kernels of ``decode``, over blocks of queries."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.triton import attention_cases, launch
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.device import on_their_device
from hf_kvcache.kernels.visibility import Visibility

#: Elements of partial outputs, and of scores for sums, at a time; a longer block of queries is cut.
_MOST_ELEMENTS = 1 << 26


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
    """
    batch, query_heads, length, _ = query.shape
    slots = dense.keys.shape[2]
    widest = dense.values.shape[-1]
    if sums:
        widest = max(widest, slots, 0 if pages is None else pages.columns * pages.layout.page_size)
    block = max(1, _MOST_ELEMENTS // (batch * query_heads * widest))
    parts = []
    for start in range(0, length, block):
        queries = slice(start, min(start + block, length))
        seen = max(0, slots - (length - queries.stop)) if visibility.causal and not sums else slots
        parts.append(
            launch.attend(
                query[:, :, queries], pages, dense.until(seen), visibility.part(queries), scoring, sums, own_last=True
            )
        )
    return parts[0] if len(parts) == 1 else _join(parts)


def _join(parts: list[Attention]) -> Attention:
    all_sums = [[getattr(p, name) for p in parts] for name in ("page_sums", "dense_sums")]
    page_sums, dense_sums = (None if m[0] is None else torch.stack(m).sum(0) for m in all_sums)
    output = torch.cat([p.output for p in parts], 1)
    return Attention(output, torch.cat([p.log_sum_exp for p in parts], 2), page_sums, dense_sums)


def compile_cases(architecture: str) -> list[CompileCase]:
    """Specializations of a long block of queries for the compile report."""
    cases = []
    for dim in (64, 128, 256):
        cases += [
            attention_cases.pages_case(architecture, "extend", codec, dim, 512) for codec in ("unbiased4", "rotated8")
        ]
        cases.append(attention_cases.dense_case(architecture, "extend", dim, 512))
    return cases
