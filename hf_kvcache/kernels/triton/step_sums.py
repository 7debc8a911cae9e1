"""The probability of each key in a decode step, added to what the keys received before.

``step_kernel`` writes all scores and ``merge_kernel`` the log-sum-exp of each query head. A third launch makes
probabilities of them, and adds those of a KV head's query heads to sums that stay where they are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.prepared_launch import PreparedLaunch

#: Keys of a program, and its warps.
_BLOCK_N, _WARPS = 1024, 4


@triton.jit(do_not_specialize=["slot", "heads", "kept_row", "kept_pages"])
def add_sums_kernel(
    # This changes from launch to launch.
    slot,
    # Scores and sums.
    kept,
    log_sum_exp,
    state,
    dense_sums,
    page_sums,
    # Strides.
    dense_b,
    dense_h,
    page_b,
    page_h,
    # Sizes.
    heads,
    kept_row,
    kept_pages,
    # Constants.
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STATE: tl.constexpr,
):
    """Add the probabilities of ``BLOCK_N`` keys of a row, averaged over its query heads; grid (rows, key blocks).

    Args:
        slot: the slot of the new token, the last that is in use; unless ``STATE``.
        kept: fp32 ``[rows, GROUP, kept_row]``, scores in base 2: of the slots, and of the pages from ``kept_pages`` on.
            What lies behind the slots in use may be anything.
        log_sum_exp: fp32 ``[rows, GROUP]``, in base 2.
        state: int64 ``[2 + B]``, from the third on the slots in use of each sequence; read if ``STATE``.
        dense_sums: fp32 ``[B, H, slots]``, added to.
        page_sums: fp32 ``[B, H, places]``, added to.
        dense_b, dense_h: elements between sequences and heads of ``dense_sums``; of ``page_sums`` likewise.
        heads: KV heads.
        kept_row: elements of a row of ``kept``.
        kept_pages: slots of a sequence.
        GROUP: query heads per KV head.
        STATE: whether lengths are read from ``state``, which counts the new token already.
    """
    row = tl.program_id(0)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    used = slot + 1
    if STATE:
        used = tl.load(state + 2 + batch).to(tl.int32)
    place = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_slot = place < tl.minimum(used, kept_pages)
    in_page = (place >= kept_pages) & (place < kept_row)
    total = tl.zeros([BLOCK_N], tl.float32)
    for query in tl.static_range(GROUP):
        at = row.to(tl.int64) * GROUP + query
        lse = tl.load(log_sum_exp + at)
        scores = tl.load(kept + at * kept_row + place, mask=in_slot | in_page, other=float("-inf"))
        total += tl.exp2(scores - lse)
    total *= 1.0 / GROUP
    dense = dense_sums + batch * dense_b + head * dense_h + place
    tl.store(dense, tl.load(dense, mask=in_slot, other=0.0) + total, mask=in_slot)
    page = page_sums + batch * page_b + head * page_h + place - kept_pages
    tl.store(page, tl.load(page, mask=in_page, other=0.0) + total, mask=in_page)


def prepare_sums(
    kept: torch.Tensor,
    log_sum_exp: torch.Tensor,
    sums: tuple[torch.Tensor, torch.Tensor],
    state: torch.Tensor | None,
    slots: int,
) -> PreparedLaunch:
    """The launch that adds the probabilities of a step to ``sums``; it takes the slot of the new token.

    Args:
        kept: float32 ``[rows, g, slots + places]``, the scores of a step.
        log_sum_exp: float32 ``[rows, g]``.
        sums: float32 ``[B, H, n]`` with ``n >= slots``, and ``[B, H, m]`` with ``m >= places``.
        state: see :func:`add_sums_kernel`; None if every sequence has equally many slots in use.
        slots: slots of a sequence.
    """
    dense, pages = sums
    rows, group, kept_row = kept.shape
    arguments: dict[str, Any] = {
        "kept": kept,
        "log_sum_exp": log_sum_exp,
        "state": kept if state is None else state,
        "dense_sums": dense,
        "page_sums": pages if pages.numel() else dense,
        "dense_b": dense.stride(0),
        "dense_h": dense.stride(1),
        "page_b": pages.stride(0),
        "page_h": pages.stride(1),
        "heads": dense.shape[1],
        "kept_row": kept_row,
        "kept_pages": slots,
        "GROUP": group,
        "BLOCK_N": _BLOCK_N,
        "STATE": state is not None,
    }
    return PreparedLaunch(add_sums_kernel, (rows, -(-kept_row // _BLOCK_N)), arguments, {"num_warps": _WARPS})


def compile_cases(architecture: str) -> list[CompileCase]:
    """The launch for a plain step, and for sequences that hold different numbers of tokens."""
    return [_case(state) for state in (False, True)]


def _case(state: bool) -> CompileCase:
    pointers = dict.fromkeys(("kept", "log_sum_exp", "dense_sums", "page_sums"), "*fp32")
    pointers["state"] = "*i64" if state else "*fp32"
    numbers = "slot", "dense_b", "dense_h", "page_b", "page_h", "heads", "kept_row", "kept_pages"
    return CompileCase(
        name="step sums" + " state" * state,
        kernel=add_sums_kernel,
        signature={**pointers, **dict.fromkeys(numbers, "i32")},
        constants={"GROUP": 4, "BLOCK_N": _BLOCK_N, "STATE": state},
        num_warps=_WARPS,
        num_stages=1,
        aligned=tuple(pointers),
    )
