"""Specializations of the attention kernels for the compile report, at 4 query heads per KV head."""

from __future__ import annotations

import torch
import triton

from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.kernels.page import PageLayout, SideFormat
from hf_kvcache.kernels.triton.attention_kernels import combine_kernel, dense_kernel, pages_kernel, sums_kernel
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.configs import Config, attention_config, dot_precision, page_stages
from hf_kvcache.kernels.triton.launch import codes_of, combine_shape, page_sides, sums_shape, weighs_products
from hf_kvcache.kernels.triton.sides import TRITON_TYPES

_GROUP, _PAGE = 4, 64
#: The share of an H100's bandwidth that a decoding step is to reach at most, by bits of a code and head dimension.
_LEAST_SHARES = {
    **{(bits, dim): 0.75 for bits in (4, 8) for dim in (64, 128)},
    **{(bits, dim): 0.6 for bits in (2, 3) for dim in (64, 128)},
}
_POINTERS = {"partial": "*fp32", "partial_lse": "*fp32", "kept_scores": "*fp32"}
_QUERY_STRIDES = {"query_b": "i32", "query_h": "i32", "query_q": "i32"}
_SIZES = {"rows": "i32", "rows_m": "i32", "heads": "i32", "window": "i32", "inner": "fp32", "softcap": "fp32"}


def formats(codec: str, dim: int, page: int = _PAGE) -> tuple[SideFormat, SideFormat]:
    """The formats of both sides of a codec's pages of ``page`` tokens. Where there is a table, its levels are made up.

    Raises:
        KeyError: if there is no case for the codec.
    """
    if codec == "dense":
        side = SideFormat(dim, 16, level="dense", zero=False, dense_dtype=torch.bfloat16)
        return side, side
    if codec == "fp8":
        side = SideFormat(dim, 8, level="float8", group=dim, zero=False)
        return side, side
    bits = {"unbiased2": 2, "unbiased3": 3, "unbiased4": 4, "rotated4": 4, "rotated8": 8}[codec]
    if codec.startswith("rotated"):
        return (
            SideFormat(dim, bits, axis="channel", group=page, rotation="hadamard"),
            SideFormat(dim, bits, axis="token", group=dim, rotation="hadamard"),
        )
    table = tuple(round(127 * (2 * i + 1 - 2**bits) / (2**bits - 1)) * 2.7 / 127 for i in range(2**bits))
    keys = SideFormat(
        dim, bits, "table", "channel", page, other=True, rotation="hadamard", centered=True, table=table, balanced=True
    )
    return keys, SideFormat(dim, bits, "table", group=dim, zero=False, rotation="signed_hadamard", table=table)


def pages_case(
    arch: str,
    operation: str,
    codec: str,
    dim: int,
    length: int,
    biased: bool = False,
    config: Config | None = None,
    page: int = _PAGE,
    everything: bool = False,
) -> CompileCase:
    """``pages_kernel`` for ``length`` bfloat16 query tokens over full pages that all of them see.

    With ``everything``, over pages that lost tokens, through a sliding window, with soft-capping.
    """
    layout = PageLayout(*formats(codec, dim, page), page, biased)
    config = config or attention_config(arch, dim, _GROUP * length, codes_of(layout))
    keys, values = page_sides(layout, torch.bfloat16, config.block_m, arch)
    block_n = min(config.block_n, page)
    rotated = layout.sides["keys"].rotation != "none"
    plain = not everything and weighs_products(Scoring(1.0), config.block_m, biased, False)
    return CompileCase(
        name=f"{operation} {codec} D={dim}" + (" bias" if biased else "") + (" everything" if everything else ""),
        kernel=pages_kernel,
        signature={
            "query": "*fp32" if rotated else "*bf16",
            **_QUERY_STRIDES,
            "pages": "*i64",
            "positions": "*i32" if everything else "*i64",
            **{"key_mean": "*fp32", "tables": "*fp32"},
            **_POINTERS,
            **_SIZES,
            **{"columns": "i32", "capacity": "i32", "start": "i64", "per_split": "i32"},
        },
        constants={
            "KEYS": keys,
            "VALUES": values,
            "GROUP": _GROUP,
            "BLOCK_M": config.block_m,
            "BLOCK_N": block_n,
            "STAGES": page_stages(config, codes_of(layout)),
            "FULL": not everything,
            "PLACED": 2 if everything else 0,
            "CAUSAL": True,
            "WINDOW": everything,
            "CENTERED": layout.sides["keys"].centered,
            "SOFTCAP": everything,
            "KEEP_SCORES": False,
            "PRODUCTS": plain and not (keys.folded or values.folded),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=("query", *_QUERY_STRIDES, "pages", "positions", "key_mean", "tables", *_POINTERS),
        loop_bytes=layout.record_bytes * block_n // page,
        tensor_cores=True,
        options=config.options,
        least_share=_LEAST_SHARES.get((layout.sides["keys"].bits, dim), 0.0) if operation == "decode" else 0.0,
    )


def dense_case(arch: str, operation: str, dim: int, length: int) -> CompileCase:
    """``dense_kernel`` for ``length`` bfloat16 query tokens that see no later token."""
    config = attention_config(arch, dim, _GROUP * length, None)
    strides = {f"{side}_{axis}": "i32" for side in ("key", "value") for axis in "bhn"}
    return CompileCase(
        name=f"{operation} full-precision tokens D={dim}",
        kernel=dense_kernel,
        signature={
            "query": "*bf16",
            **_QUERY_STRIDES,
            "keys": "*bf16",
            "values": "*bf16",
            **strides,
            "positions": "*i64",
            "position_b": "i32",
            "unused": "*u8",
            "unused_b": "i32",
            **_POINTERS,
            **_SIZES,
            "slots": "i32",
            "per_split": "i32",
            "first_split": "i32",
            "start": "i64",
        },
        constants={
            "KEY_DIM": dim,
            "VALUE_DIM": dim,
            "KEY_PAD": dim,
            "VALUE_PAD": dim,
            "COMPUTE": TRITON_TYPES[torch.bfloat16],
            "PRECISION": dot_precision(arch),
            "GROUP": _GROUP,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "STAGES": config.num_stages,
            "PLACED": True,
            "CAUSAL": True,
            "WINDOW": False,
            "UNUSED": False,
            "OWN_LAST": length > 1,
            "SOFTCAP": False,
            "KEEP_SCORES": False,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=("query", *_QUERY_STRIDES, "keys", "values", *strides, "positions", "unused", *_POINTERS),
        loop_bytes=2 * 2 * dim * config.block_n,
        tensor_cores=True,
        options=config.options,
    )


def combine_case(arch: str, dim: int) -> CompileCase:
    """``combine_kernel`` with a rotation."""
    dim_pad = triton.next_power_of_2(dim)
    chunk, warps = combine_shape(dim_pad)
    return CompileCase(
        name=f"combine D={dim}",
        kernel=combine_kernel,
        signature={
            "partial": "*fp32",
            "partial_lse": "*fp32",
            "rotation": "*fp32",
            "sinks": "*fp32",
            "output": "*bf16",
            "log_sum_exp": "*fp32",
            **{name: "i32" for name in ("rows", "rows_m", "heads", "page_splits", "splits")},
        },
        constants={
            "DIM": dim,
            "DIM_PAD": dim_pad,
            "CHUNK": chunk,
            "GROUP": _GROUP,
            "BLOCK_M": 16,
            "ROTATED": True,
            "SINKS": False,
            "PRECISION": dot_precision(arch),
        },
        num_warps=warps,
        num_stages=1,
        aligned=("partial", "partial_lse", "rotation", "sinks", "output", "log_sum_exp"),
    )


def sums_case(arch: str) -> CompileCase:
    """``sums_kernel`` for whole pages of keys."""
    block_n, warps = sums_shape(arch)
    return CompileCase(
        name="sums",
        kernel=sums_kernel,
        signature={"scores": "*fp32", "log_sum_exp": "*fp32", "sums": "*fp32", "rows_m": "i32", "keys": "i32"},
        constants={"GROUP": _GROUP, "BLOCK_N": block_n},
        num_warps=warps,
        num_stages=1,
        aligned=("scores", "log_sum_exp", "sums", "keys"),
    )
