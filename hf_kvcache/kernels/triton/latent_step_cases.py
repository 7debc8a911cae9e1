"""Specializations of the kernels of a step over latents for the compile report, with DeepSeek-V2's widths."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.page import PageLayout
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.latent_configs import LEAST_DIM, PRECISION, page_sides, reads
from hf_kvcache.kernels.triton.latent_step import PROJECT, PROJECT_OPTIONS, step_config
from hf_kvcache.kernels.triton.latent_step_kernels import project_kernel, step_kernel
from hf_kvcache.kernels.triton.sides import TRITON_TYPES

_RANK, _ROTARY, _NOPE = 512, 64, 128
_SLOT_STRIDES = dict.fromkeys(("latent_slots_b", "latent_slots_n", "rotary_slots_b", "rotary_slots_n"), "i32")
_BF16 = TRITON_TYPES[torch.bfloat16]


def project_case(heads: int, ragged: bool = False) -> CompileCase:
    """``project_kernel`` into the rotated basis of the latents."""
    pointers = dict.fromkeys(("query", "latents", "rotary", "weight", "latent_slots", "rotary_slots"), "*bf16")
    pointers |= {
        "lengths": "*i64" if ragged else "*fp32",
        "signs": "*fp32",
        "rotary_signs": "*fp32",
        "absorbed": "*bf16",
        "rotated": "*fp32",
        "turned": "*fp32",
    }
    strides = dict.fromkeys(("query_b", "query_h", "latents_b", "rotary_b", "weight_h", "weight_d"), "i32")
    strides |= _SLOT_STRIDES
    return CompileCase(
        name="latent_decode step: projection" + (" ragged" if ragged else ""),
        kernel=project_kernel,
        signature=pointers | strides | {"slot": "i32", "batch": "i32"},
        constants={
            "HEADS": heads,
            "DN": _NOPE,
            "R": _RANK,
            "LOG_R": _RANK.bit_length() - 1,
            "DR": _ROTARY,
            "DR_PAD": _ROTARY,
            "LOG_DR": _ROTARY.bit_length() - 1,
            **PROJECT,
            "COMPUTE": _BF16,
            "TURN": "hadamard",
            "TURN_ROTARY": "none",
            "RAGGED": ragged,
        },
        num_warps=PROJECT_OPTIONS["num_warps"],
        num_stages=PROJECT_OPTIONS["num_stages"],
        aligned=(*pointers, *strides),
        loop_bytes=PROJECT["BLOCK_K"] * _RANK * 2,
        tensor_cores=True,
    )


def step_case(arch: str, codec: str, layout: PageLayout, heads: int, ragged: bool = False) -> CompileCase:
    """``step_kernel`` for a bfloat16 query over full pages of a codec and a buffer of full-precision tokens."""
    config = step_config(arch, heads, reads(layout, torch.bfloat16, arch))
    latents, rotary = page_sides(layout, torch.bfloat16, arch)
    rotated = layout.sides["keys"].rotation != "none"
    pointers = {"absorbed": "*bf16", "rotated": "*fp32" if rotated else "*bf16", "turned": "*bf16", "pages": "*i64"}
    pointers |= {"tables": "*fp32", "latent_slots": "*bf16", "rotary_slots": "*bf16"}
    pointers |= {"lengths": "*i64" if ragged else "*fp32", "partial": "*fp32", "partial_lse": "*fp32"}
    strides = {"turned_b": "i32", "turned_h": "i32", **_SLOT_STRIDES}
    sizes = ("slots", "rows", "columns", "capacity", "per_split", "page_splits", "per_dense", "rows_m")
    return CompileCase(
        name=f"latent_decode step {codec} H={heads}" + (" ragged" if ragged else ""),
        kernel=step_kernel,
        signature=pointers | strides | dict.fromkeys(sizes, "i32") | {"inner": "fp32", "softcap": "fp32"},
        constants={
            "LATENTS": latents,
            "ROTARY": rotary,
            "R": _RANK,
            "DR": _ROTARY,
            "DR_PAD": max(LEAST_DIM, _ROTARY),
            "COMPUTE": _BF16,
            "PRECISION": PRECISION,
            "GROUP": heads,
            "BLOCK_M": config.block_m,
            "PAGE_TOKENS": config.block_n,
            "DENSE_TOKENS": config.block_n,
            "STAGES": config.num_stages,
            "ROTATED": rotated,
            "FULL": not ragged,
            "SOFTCAP": False,
            "RAGGED": ragged,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=(*pointers, *strides),
        loop_bytes=layout.record_bytes * config.block_n // layout.page_size,
        tensor_cores=True,
        options=config.options,
    )
