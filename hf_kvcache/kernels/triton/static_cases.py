"""How the kernels behind attention in a compiled step are compiled, and their cases for the compile report."""

from __future__ import annotations

from typing import Any

import torch
import triton

from hf_kvcache.kernels.page import PageLayout
from hf_kvcache.kernels.triton.attention_cases import formats
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.static_kernels import commit_kernel, merge_static_kernel
from hf_kvcache.kernels.triton.step_config import MERGED_SPLITS, StepKind, Turn

COMMIT_WARPS = 4
#: Slots that ``commit_kernel`` moves at a time.
_BLOCK = 32
_CPU = torch.device("cpu")
#: Sequences, KV heads, slots and pages a row, query heads per KV head, tokens of a page.
_SIZES, _GROUP, _PAGE = (1, 8, 260, 255), 4, 128


def merge_constants(
    kind: StepKind, turn: Turn, sizes: tuple[int, int, int, int], sinks: bool, window: bool, mask: int
) -> dict[str, Any]:
    """The constants of ``merge_static_kernel``."""
    return {
        "DIM": kind.value_dim,
        "DIM_PAD": triton.next_power_of_2(kind.value_dim),
        "LOG_D": turn.log_dim,
        "BLOCK_S": MERGED_SPLITS,
        "COLUMNS_PAD": triton.next_power_of_2(sizes[3]) if window else 1,
        "HEADS_PAD": triton.next_power_of_2(sizes[1]),
        "ROTATION": turn.kind,
        "SINKS": sinks,
        "WINDOW": window,
        "MASK": mask,
    }


def commit_constants(
    page_size: int, key_dim: int, value_dim: int, sizes: tuple[int, int, int, int], window: bool
) -> dict[str, Any]:
    """The constants of ``commit_kernel``."""
    return {
        "PAGE": page_size,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "KEY_PAD": triton.next_power_of_2(key_dim),
        "VALUE_PAD": triton.next_power_of_2(value_dim),
        "PAGE_PAD": triton.next_power_of_2(page_size),
        "COLUMNS_PAD": triton.next_power_of_2(sizes[3]) if window else 1,
        "BATCH_PAD": triton.next_power_of_2(sizes[0]),
        "BLOCK": _BLOCK,
        "WINDOW": window,
    }


def compile_cases(architecture: str) -> list[CompileCase]:
    """The cases for a target."""
    cases = []
    for window, mask in ((False, 0), (True, 1)):
        cases += [_merge_case(architecture, 128, window, mask), _commit_case(architecture, 128, window)]
    return cases


def _merge_case(arch: str, dim: int, window: bool, mask: int) -> CompileCase:
    layout = PageLayout(*formats("unbiased4", dim), _PAGE)
    kind = StepKind(arch, torch.bfloat16, torch.bfloat16, layout, dim, dim, _GROUP)
    pointers = {
        "output": "*bf16",
        **dict.fromkeys(("partial", "partial_lse", "rotation", "sinks"), "*fp32"),
        **dict.fromkeys(("events", "state", "positions", "first"), "*i64"),
        "page_positions": "*i32",
        "mask": "*u8",
    }
    sizes = ("stride", "page_splits", "splits", "batch", "query_heads", "heads", "slots", "sink_length", "page_size")
    more = "capacity", "window", "max_length", "mask_b"
    turn = kind.output_turn(_CPU)
    constants = merge_constants(kind, turn, _SIZES, window, window, mask)
    return CompileCase(
        name=f"merge and count D={dim}" + (" window" if window else "") + (" mask" if mask else ""),
        kernel=merge_static_kernel,
        signature={**pointers, **dict.fromkeys((*sizes, *more), "i32"), "mask_least": "fp32"},
        constants=constants,
        num_warps=kind.merge_options["num_warps"],
        num_stages=kind.merge_options["num_stages"],
        aligned=tuple(pointers),
    )


def _commit_case(arch: str, dim: int, window: bool) -> CompileCase:
    pointers = {
        **dict.fromkeys(("events", "state", "positions", "places", "first"), "*i64"),
        **dict.fromkeys(("keys", "values"), "*bf16"),
        "page_positions": "*i32",
    }
    strides = tuple(f"{name}_{axis}" for name in ("key", "value") for axis in "bhn")
    sizes = ("batch", "heads", "slots", "sink_length", "capacity")
    return CompileCase(
        name=f"commit D={dim}" + (" window" if window else ""),
        kernel=commit_kernel,
        signature={**pointers, **dict.fromkeys((*strides, *sizes), "i32")},
        constants=commit_constants(_PAGE, dim, dim, _SIZES, window),
        num_warps=COMMIT_WARPS,
        num_stages=1,
        aligned=(*pointers, *strides),
    )
