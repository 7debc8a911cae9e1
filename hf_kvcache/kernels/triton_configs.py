"""Static launch configurations of the Triton kernels, by architecture and head dimension; nothing is tuned."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton


class Config(NamedTuple):
    """How a kernel is launched.

    Attributes:
        block_m: queries of a program.
        block_n: tokens that are taken at a time.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


#: Queries of a program, at most.
MOST_QUERIES = 64


@lru_cache(maxsize=8)
def architecture(device: torch.device) -> str:
    """The name of a device's architecture as in ``compile_case.ARCHITECTURES``; ``"cpu"`` for the interpreter."""
    if device.type == "cpu":
        return "cpu"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


@lru_cache(maxsize=8)
def programs_wanted(device: torch.device) -> int:
    """How many programs fill a device: two for each of its multiprocessors."""
    if device.type == "cpu":
        return 6  # the interpreter runs one at a time; a few splits are what tests want to see
    return 2 * int(torch.cuda.get_device_properties(device).multi_processor_count)


def dot_precision(arch: str) -> str:
    """How dot products of fp32 are done: on NVIDIA's matrix units in three parts, elsewhere plainly."""
    return "tf32x3" if arch.startswith("sm") else "ieee"


@lru_cache(maxsize=256)
def attention_config(arch: str, dim: int, queries: int, coded: bool) -> Config:
    """The configuration of the attention kernels.

    Args:
        arch: the architecture.
        dim: the larger of the key's and the value's width.
        queries: queries of a row.
        coded: whether keys and values are codes; else full-precision elements.
    """
    block_m = min(MOST_QUERIES, max(16, triton.next_power_of_2(queries)))
    block_n = 64 if dim <= 128 else 32
    stages = 3 if dim <= 128 or coded else 2
    # Two warps at most 64 wide: with more, a thread's share of a page of few bits is less than a 16-byte load.
    warps = 2 if dim <= 64 and block_m <= 32 else 4
    return Config(block_m, block_n, warps, 1 if arch == "cpu" else stages)
