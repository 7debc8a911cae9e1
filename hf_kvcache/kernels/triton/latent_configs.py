"""Launch configurations of the latent kernels, by architecture and by what they read: static, without tuning."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.page import PageLayout
from hf_kvcache.kernels.triton.configs import LARGE_SHARED, Config
from hf_kvcache.kernels.triton.launch import dense_compute
from hf_kvcache.kernels.triton.sides import Side, describe_side

#: Fewest channels that a dot product takes.
LEAST_DIM = 16
#: The precision of dot products of float32. In three parts on matrix units they would need too many registers.
PRECISION = "ieee"
#: Queries of a sequence up to which coded pages are read as they are: 8 blocks of queries.
MOST_READING_PAGES = 256
#: Splits that ``merge_kernel`` reads at a time.
MERGED_AT_ONCE = 16

#: What a program reads: codes of pages, 16-bit elements of pages, tokens of 16 bits (full-precision ones or decoded
#: pages), or anything whose dot products are in float32.
Read = Literal["codes", "halves", "tokens", "singles"]


def latent_config(arch: str, queries: int, read: Read, masked: bool = False) -> Config:
    """The largest tiles with 8 warps on a multiprocessor and without spills, according to the compile report.

    Args:
        arch: the architecture, as in :func:`hf_kvcache.kernels.triton.configs.architecture`.
        queries: queries of a sequence: heads times query tokens.
        read: what the program reads.
        masked: whether there is a mask. Beside coded pages, its places leave registers for fewer tokens at a time.
    """
    amd = arch.startswith("gfx")
    most = 16 if read == "singles" or (amd and read == "codes") else 32
    block_m = min(most, max(16, triton.next_power_of_2(queries)))
    if amd:
        return Config(block_m, 16, 4 if block_m == 16 else 8, 1, {})
    if read == "singles":
        return Config(block_m, 16, 8, 3 if arch == "sm80" else 2, {})
    # Three stages are one tile ahead, since a page's address has to be read before.
    few = (read == "tokens" and arch not in LARGE_SHARED) or (read == "codes" and masked)
    return Config(block_m, 16 if few else 32, 8, 3, {})


def page_sides(layout: PageLayout, dtype: torch.dtype, arch: str) -> tuple[Side, Side | None]:
    """Compile-time descriptions of latents and rotary keys (None where they have no width) for queries of ``dtype``."""
    sides = []
    for name, fmt in layout.sides.items():
        compute = tl.float32 if dtype == torch.float32 else tl.float16
        if fmt.dense_dtype is not None:
            compute = dense_compute(dtype, fmt.dense_dtype, arch)
        # A scale per channel would have to go into a copy of the queries, for which there are no registers.
        fold = name == "keys" and fmt.axis == "token" and not fmt.other
        side = describe_side(layout, name, compute, fold, PRECISION, weighed=True)  # latents are values too
        # A dot product takes 16 channels at least.
        sides.append(replace(side, segment_pad=max(side.segment_pad, LEAST_DIM // side.segments)))
    return sides[0], sides[1] if sides[1].dim else None


def decoded_dtypes(layout: PageLayout, queries: int, dtype: torch.dtype, arch: str) -> tuple[torch.dtype, ...] | None:
    """The types of latents and rotary keys if pages are to be decoded before they are attended to; else None.

    Pages of codes are, for many queries, since each block of queries would decode them again, and for queries of 32
    bits, since registers do not hold what the decoding in the kernel needs beside them.
    """
    coded = any(fmt.level != "dense" for fmt in layout.sides.values() if fmt.dim)
    if coded and reads(layout, dtype, arch) == "singles":
        return torch.float32, torch.float32
    return (torch.float16, torch.float16) if coded and queries > MOST_READING_PAGES else None


def reads(layout: PageLayout, dtype: torch.dtype, arch: str) -> Read:
    """What a program reads of pages for queries of ``dtype``."""
    latents, rotary = page_sides(layout, dtype, arch)
    if tl.float32 in (latents.compute, None if rotary is None else rotary.compute):
        return "singles"
    return "halves" if latents.level == "dense" else "codes"
