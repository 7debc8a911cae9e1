"""Specializations of the latent kernels for the compile report: DeepSeek-V2's widths (r = 512, dr = 64)."""

from __future__ import annotations

from typing import Any

import torch

from hf_kvcache.kernels.page import PageLayout, SideFormat
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.configs import Config
from hf_kvcache.kernels.triton.decoded_pages import decode_case
from hf_kvcache.kernels.triton.latent_configs import MERGED_AT_ONCE, PRECISION, latent_config, page_sides, reads
from hf_kvcache.kernels.triton.latent_kernels import dense_kernel, merge_kernel, pages_kernel
from hf_kvcache.kernels.triton.latent_step_cases import project_case, step_case
from hf_kvcache.kernels.triton.sides import TRITON_TYPES

_ROTARY, _PAGE = 64, 64
_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_QUERY_STRIDES = {"query_b": "i32", "query_h": "i32", "query_q": "i32"}
_TURNED_STRIDES = {"turned_b": "i32", "turned_h": "i32", "turned_q": "i32"}
_MASK = {"mask": "*u8", "mask_b": "i32", "mask_h": "i32", "mask_q": "i32"}
_SIZES = {
    **{name: "i32" for name in ("rows", "per_split", "rows_m", "window", "mask_shift", "mask_columns")},
    **{name: "fp32" for name in ("inner", "softcap", "lowest")},
}
_PARTIAL = {"partial": "*fp32", "partial_lse": "*fp32"}


def compile_cases(arch: str) -> list[CompileCase]:
    """Pages of each codec for 16 heads (one device of eight) and for 128; full-precision tokens; the merge."""
    cases = [pages_case(arch, codec, heads) for codec in ("bf16", "int8", "int4") for heads in (16, 128)]
    cases.append(pages_case(arch, "int8", 128, everything=True))
    cases += [dense_case(arch, torch.bfloat16, heads, 512) for heads in (16, 128)]
    cases += [project_case(128, ragged) for ragged in (False, True)]
    for codec in ("bf16", "int8", "int4"):
        layout = PageLayout(latent_format(codec, 512), latent_format("bf16", _ROTARY), _PAGE)
        cases += [step_case(arch, codec, layout, heads) for heads in (16, 128)]
        if codec == "int8":
            cases.append(step_case(arch, codec, layout, 128, ragged=True))
    rank = 128 if arch.startswith("gfx") else 512
    cases.append(dense_case(arch, torch.float32, 128, rank))
    cases += [dense_case(arch, torch.float32, 128, rank, decoded=True), dense_case(arch, torch.float16, 128, 512, True)]
    for codec, dtype in (("int4", torch.float32), ("int8", torch.float16)):
        layout = PageLayout(latent_format(codec, rank), latent_format("bf16", _ROTARY), _PAGE)
        cases.append(decode_case(arch, f"latent_decode decode {codec} to {_NAMES[dtype]}", layout, (dtype, dtype)))
    return [*cases, merge_case()]


def latent_format(codec: str, rank: int) -> SideFormat:
    """The format in which a codec stores latents: a scale per token, or with 4 bits one for 32 channels of a token.

    Raises:
        KeyError: if there is no case for the codec.
    """
    return {
        "bf16": SideFormat(rank, 16, level="dense", zero=False, dense_dtype=torch.bfloat16),
        "int8": SideFormat(rank, 8, group=rank, rotation="hadamard"),
        "int4": SideFormat(rank, 4, group=32, rotation="hadamard"),
    }[codec]


def pages_case(arch: str, codec: str, heads: int, everything: bool = False, rank: int = 512) -> CompileCase:
    """``pages_kernel`` for a bfloat16 query over full pages that it sees, or over some of them under a mask."""
    fmt = latent_format(codec, rank)
    layout = PageLayout(fmt, latent_format("bf16", _ROTARY), _PAGE)
    config = latent_config(arch, heads, reads(layout, torch.bfloat16, arch), everything)
    latents, rotary = page_sides(layout, torch.bfloat16, arch)
    pointers = {
        "query": "*bf16" if fmt.rotation == "none" else "*fp32",
        "turned_query": "*bf16",
        "pages": "*i64",
        "positions": "*i32",
        "tables": "*fp32",
        **_PARTIAL,
    }
    return CompileCase(
        name=f"latent_decode {codec} H={heads}" + (" masked" if everything else ""),
        kernel=pages_kernel,
        signature=pointers
        | _QUERY_STRIDES
        | _TURNED_STRIDES
        | _MASK
        | _SIZES
        | {"columns": "i32", "capacity": "i32", "start": "i64"},
        constants={
            "LATENTS": latents,
            "ROTARY": rotary,
            "BLOCK_N": config.block_n,
            "FULL": not everything,
            "PLACED": 2 if everything else 0,
            **_constants(config, heads, everything),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=(*pointers, *_QUERY_STRIDES, *_TURNED_STRIDES),
        loop_bytes=layout.record_bytes * config.block_n // _PAGE,
        tensor_cores=True,
        options=config.options,
    )


def _constants(config: Any, heads: int, everything: bool) -> dict[str, Any]:
    return {
        "GROUP": heads,
        "BLOCK_M": config.block_m,
        "STAGES": config.num_stages,
        "CAUSAL": True,
        "WINDOW": everything,
        "MASK": "bool" if everything else "none",
        "SOFTCAP": everything,
    }


def dense_case(
    arch: str, dtype: torch.dtype, heads: int, rank: int, decoded: bool = False, config: Config | None = None
) -> CompileCase:
    """``dense_kernel`` for one query that sees no later token, or going on over decoded pages that it sees."""
    if config is None:
        config = latent_config(arch, heads, "singles" if dtype == torch.float32 else "tokens")
    name = _NAMES[dtype]
    pointers = {"query": "*fp32" if decoded else f"*{name}", "turned_query": "*fp32" if decoded else f"*{name}"}
    pointers |= {"latents": f"*{name}", "rotary": f"*{name}", "positions": "*i64", "unused": "*u8"}
    strides = {"latent_b": "i32", "latent_n": "i32", "rotary_b": "i32", "rotary_n": "i32"}
    kind = "decoded" if decoded else "full-precision"
    return CompileCase(
        name=f"latent_decode {kind} tokens {name} r={rank} H={heads}",
        kernel=dense_kernel,
        signature={
            **pointers,
            **_QUERY_STRIDES,
            **_TURNED_STRIDES,
            **strides,
            **{"position_b": "i32", "unused_b": "i32"},
            **_MASK,
            **_PARTIAL,
            **_SIZES,
            **{"slots": "i32", "first_split": "i32", "skipped": "i32", "start": "i64"},
        },
        constants={
            "R": rank,
            "DR": _ROTARY,
            "DR_PAD": _ROTARY,
            "COMPUTE": TRITON_TYPES[dtype],
            "PRECISION": PRECISION,
            "BLOCK_N": config.block_n,
            "PLACED": not decoded,
            "UNUSED": not decoded,
            "CONTINUED": decoded,
            **_constants(config, heads, False),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=(*pointers, *_PARTIAL, *_QUERY_STRIDES, *_TURNED_STRIDES, *strides),
        loop_bytes=config.block_n * ((rank + _ROTARY) * dtype.itemsize + 9),
        tensor_cores=dtype != torch.float32,
        options=config.options,
    )


def merge_case() -> CompileCase:
    """``merge_kernel`` with a rotation."""
    pointers = {"signs": "*fp32", "sinks": "*fp32", "output": "*bf16", "log_sum_exp": "*fp32", **_PARTIAL}
    return CompileCase(
        name="latent_decode merge",
        kernel=merge_kernel,
        signature=pointers | dict.fromkeys(("rows", "rows_m", "page_splits", "splits"), "i32"),
        constants={
            "R": 512,
            "LOG_R": 9,
            "GROUP": 16,
            "BLOCK_S": MERGED_AT_ONCE,
            "ROTATED": True,
            "SIGNED": False,
            "SINKS": False,
        },
        num_warps=4,
        num_stages=2,
        aligned=tuple(pointers),
        loop_bytes=MERGED_AT_ONCE * 513 * 4,
    )
