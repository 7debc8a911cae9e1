"""Specializations of the kernels of a decode step for the compile report, at 4 query heads per KV head."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.page import PageLayout
from hf_kvcache.kernels.triton.attention_cases import formats
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.sides import TRITON_TYPES
from hf_kvcache.kernels.triton.step_config import StepKind
from hf_kvcache.kernels.triton.step_kernels import merge_kernel, step_kernel

_GROUP, _PAGE, _BATCH = 4, 64, 1
_CPU = torch.device("cpu")
#: Codec, width and dtype of the query: the defaults at the usual width, and what needs more registers.
_CASES = [
    *(
        (codec, 128, torch.bfloat16)
        for codec in ("unbiased4", "rotated8", "rotated4", "unbiased2", "unbiased3", "dense")
    ),
    *((codec, dim, torch.bfloat16) for dim in (64, 256) for codec in ("unbiased4", "rotated8")),
    ("rotated8", 128, torch.float32),
]


def compile_cases(architecture: str) -> list[CompileCase]:
    """The cases for a target."""
    steps = [_step_case(architecture, *case) for case in _CASES]
    with_state = [_step_case(architecture, "unbiased4", 128, torch.bfloat16, state=state) for state in (1, 2)]
    biased = _step_case(architecture, "rotated4", 128, torch.bfloat16, biased=True)
    windowed = _step_case(architecture, "rotated8", 128, torch.bfloat16, window=True)
    # Compiled steps have a mask, as transformers makes one for them.
    masked = [
        _step_case(architecture, *case, state=2, window=window, mask=1)
        for case in (("unbiased4", 128, torch.bfloat16), ("rotated8", 128, torch.bfloat16))
        for window in (False, True)
    ]
    summed = [_step_case(architecture, codec, 128, torch.bfloat16, keep=True) for codec in ("unbiased4", "rotated4")]
    merges = [_merge_case(architecture, dim) for dim in (64, 128, 256)]
    return [*steps, *with_state, biased, windowed, *masked, *summed, *merges]


def _kind(arch: str, codec: str, dim: int, dtype: torch.dtype, biased: bool = False) -> StepKind:
    return StepKind(arch, dtype, dtype, PageLayout(*formats(codec, dim), _PAGE, biased), dim, dim, _GROUP)


def _step_case(
    arch: str,
    codec: str,
    dim: int,
    dtype: torch.dtype,
    state: int = 0,
    window: bool = False,
    mask: int = 0,
    keep: bool = False,
    biased: bool = False,
) -> CompileCase:
    kind = _kind(arch, codec, dim, dtype, biased)
    assert kind.layout is not None
    tokens = f"*{TRITON_TYPES[dtype]}"
    strides = [f"{name}_{axis}" for name in ("query", "new_key", "new_value") for axis in "bh"]
    strides += [f"{name}_{axis}" for name in ("key", "value") for axis in "bhn"]
    pointers = {
        **dict.fromkeys(("query", "new_keys", "new_values", "keys", "values"), tokens),
        **dict.fromkeys(("positions", "pages", "state"), "*i64"),
        "page_places": "*i32" if state == 2 else "*i64",
        "records": "*u8",
        "mask": "*u8" if mask else "*fp32",
        **dict.fromkeys(("key_mean", "key_scale", "tables", "rotation", "partial", "partial_lse", "kept"), "*fp32"),
    }
    sizes = ("slot", "position", "columns", "capacity", "page_splits", "per_dense", "rows", "heads", "rows_m", "window")
    more = "mask_b", "record_bytes", "max_length", "kept_row", "kept_pages"
    constants = kind.step_constants(
        kind.query_turn(_CPU),
        state=state,
        full=not window or state == 2,
        placed=3 if state == 2 else int(window),
        window=window,
        mask=mask,
        centered=kind.layout.sides["keys"].centered,
        scaled=kind.layout.sides["keys"].balanced,
        softcap=False,
        keep=keep,
    )
    config, block_n = kind.config, constants["BLOCK_N"]
    name = f"step {codec} D={dim}" + (" fp32" if dtype == torch.float32 else "") + (" bias" if biased else "")
    return CompileCase(
        name=name
        + ("", " state", " static")[state]
        + (" window" if window else "")
        + (" mask" if mask else "")
        + (" sums" if keep else ""),
        kernel=step_kernel,
        signature={
            **pointers,
            **dict.fromkeys((*strides, "position_b", *sizes, *more), "i32"),
            "mask_least": "fp32",
            "inner": "fp32",
            "softcap": "fp32",
        },
        constants=constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=(*pointers, *strides, "position_b"),
        loop_bytes=kind.layout.record_bytes * block_n // _PAGE,
        tensor_cores=True,
        options=config.options,
    )


def _merge_case(arch: str, dim: int) -> CompileCase:
    kind = _kind(arch, "unbiased4", dim, torch.bfloat16)
    pointers = {
        "output": "*bf16",
        **dict.fromkeys(("partial", "partial_lse", "log_sum_exp", "rotation", "sinks"), "*fp32"),
        "state": "*i64",
    }
    sizes = ("stride", "page_splits", "splits", "batch", "query_heads")
    return CompileCase(
        name=f"merge D={dim}",
        kernel=merge_kernel,
        signature={**pointers, **dict.fromkeys(sizes, "i32")},
        constants=kind.merge_constants(kind.output_turn(_CPU), _BATCH, sinks=False, advance=False),
        num_warps=kind.merge_options["num_warps"],
        num_stages=kind.merge_options["num_stages"],
        aligned=tuple(pointers),
    )
