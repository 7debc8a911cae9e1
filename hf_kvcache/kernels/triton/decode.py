"""Attention of a few new queries over pages and full-precision tokens by Triton kernels."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.attention import MOST_DECODED_QUERIES
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages, Scoring
from hf_kvcache.kernels.triton import attention_cases, launch, step_cases, step_sums
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.device import on_their_device
from hf_kvcache.kernels.triton.step import PreparedCall as PreparedCall
from hf_kvcache.kernels.visibility import Visibility


def supports(query: torch.Tensor, pages: Pages | None, dense: DenseTokens, visibility: Visibility) -> bool:
    """Whether :func:`attend` can do a call: at most 16 query tokens, no mask, head dimensions from 16 to 256."""
    return query.shape[2] <= MOST_DECODED_QUERIES and launch.can_attend(query, pages, dense, visibility)


@on_their_device
def attend(
    query: torch.Tensor,
    pages: Pages | None,
    dense: DenseTokens,
    visibility: Visibility,
    scoring: Scoring,
    sums: bool = False,
) -> Attention:
    """As :func:`hf_kvcache.kernels.reference.decode.attend`.

    Keys and values enter dot products in half precision where queries are in 16 bits (dense pages in their own dtype),
    and sums are in float32.
    """
    return launch.attend(query, pages, dense, visibility, scoring, sums, own_last=False)


def compile_cases(architecture: str) -> list[CompileCase]:
    """Specializations of a decoding step for the compile report."""
    codecs = ("unbiased4", "rotated4", "rotated8", "unbiased2", "unbiased3", "fp8", "dense")
    cases = [
        attention_cases.pages_case(architecture, "decode", codec, dim, 1) for dim in (64, 128, 256) for codec in codecs
    ]
    cases.append(attention_cases.pages_case(architecture, "decode", "rotated4", 128, 1, biased=True))
    for dim in (64, 128, 256):
        cases.append(attention_cases.dense_case(architecture, "decode", dim, 1))
        cases.append(attention_cases.combine_case(architecture, dim))
    cases += [attention_cases.sums_case(architecture), *step_sums.compile_cases(architecture)]
    return cases + step_cases.compile_cases(architecture)
