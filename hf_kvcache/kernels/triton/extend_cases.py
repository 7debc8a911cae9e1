"""Specializations of the kernels of ``extend`` for the compile report, at 4 query heads per KV head."""

from __future__ import annotations

import torch
import triton

from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.kernels.page import PageLayout
from hf_kvcache.kernels.triton import attention_cases
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.configs import Config, dot_precision
from hf_kvcache.kernels.triton.decoded_pages import decode_case
from hf_kvcache.kernels.triton.extend_configs import extend_config, extend_pages_config
from hf_kvcache.kernels.triton.extend_kernels import tokens_kernel
from hf_kvcache.kernels.triton.launch import weighs_products
from hf_kvcache.kernels.triton.sides import TRITON_TYPES

_GROUP, _PAGE, _LARGE_PAGE = 4, 64, 128
_QUERY_STRIDES = {"query_b": "i32", "query_h": "i32", "query_q": "i32"}
_PARTIAL = {"partial": "*fp32", "partial_lse": "*fp32"}
_SIZES = dict.fromkeys(("rows", "slots", "per_split", "rows_m", "heads", "window", "first_split"), "i32")
_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def compile_cases(arch: str) -> list[CompileCase]:
    """Few blocks of queries, which read pages themselves; many, which read decoded tokens; and the decoding."""
    cases = []
    for dim in (64, 128, 256):
        cases += [_pages_case(arch, codec, dim) for codec in ("unbiased4", "rotated8")]
        cases.append(attention_cases.dense_case(arch, "extend", dim, 512))
        cases.append(tokens_case(arch, dim, torch.float16))
    cases += [_pages_case(arch, codec, 128, everything=True) for codec in ("unbiased4", "rotated8")]
    cases += [_pages_case(arch, codec, 128) for codec in ("unbiased3", "unbiased2")]
    cases.append(tokens_case(arch, 128, torch.bfloat16))
    cases.append(tokens_case(arch, 128, torch.float32))
    for codec in ("unbiased4", "unbiased3", "rotated8", "fp8"):
        layout = PageLayout(*attention_cases.formats(codec, 128), _PAGE)
        cases.append(decode_case(arch, f"extend decode {codec}", layout, (torch.float16, torch.float16)))
    return cases


def _pages_case(arch: str, codec: str, dim: int, everything: bool = False) -> CompileCase:
    """``pages_kernel`` for 64 query tokens; where it can decode pages of the usual size as it reads them, so."""
    layout = PageLayout(*attention_cases.formats(codec, dim, _LARGE_PAGE), _LARGE_PAGE)
    config = extend_pages_config(layout, arch, _GROUP * 64, torch.bfloat16, everything)
    page = _PAGE if config is None else _LARGE_PAGE
    return attention_cases.pages_case(arch, "extend", codec, dim, 64, config=config, page=page, everything=everything)


def tokens_case(arch: str, dim: int, dtype: torch.dtype, config: Config | None = None) -> CompileCase:
    """``tokens_kernel`` that goes on over decoded pages (float16) or reads the tokens of the queries."""
    config = extend_config(arch, dim, 2048, dtype) if config is None else config
    name, decoded = _NAMES[dtype], dtype == torch.float16
    strides = {f"{side}_{axis}": "i32" for side in ("key", "value") for axis in "bhn"}
    pointers = {"query": "*fp32" if decoded else f"*{name}", "keys": f"*{name}", "values": f"*{name}"}
    pointers |= {"positions": "*i64", "unused": "*u8"}
    return CompileCase(
        name=f"extend {'decoded' if decoded else 'full-precision'} tokens {name} D={dim}",
        kernel=tokens_kernel,
        signature={
            **pointers,
            **_QUERY_STRIDES,
            **strides,
            **_PARTIAL,
            **_SIZES,
            **{"position_b": "i32", "unused_b": "i32", "start": "i64", "inner": "fp32", "softcap": "fp32"},
        },
        constants={
            "KEY_DIM": dim,
            "VALUE_DIM": dim,
            "KEY_PAD": triton.next_power_of_2(dim),
            "VALUE_PAD": triton.next_power_of_2(dim),
            "COMPUTE": TRITON_TYPES[dtype],
            "PRECISION": dot_precision(arch),
            "GROUP": _GROUP,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "STAGES": config.num_stages,
            "PLACED": not decoded,
            "CAUSAL": True,
            "WINDOW": False,
            "UNUSED": False,
            "OWN_LAST": not decoded,
            "SOFTCAP": False,
            "CONTINUED": decoded,
            "PRODUCTS": weighs_products(Scoring(1.0), config.block_m, False, False),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=(*pointers, *_QUERY_STRIDES, *strides, *_PARTIAL),
        loop_bytes=2 * dtype.itemsize * dim * config.block_n,
        tensor_cores=dtype != torch.float32,
        options=config.options,
    )
