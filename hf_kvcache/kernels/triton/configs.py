"""Static launch configurations of the Triton kernels, by architecture and head dimension; nothing is tuned."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton

from hf_kvcache.kernels.reference.pack import bit_planes


class Config(NamedTuple):
    """How a kernel is launched.

    Attributes:
        block_m: queries of a program.
        block_n: tokens that are taken at a time.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        options: what else the compiler is told.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    options: dict[str, Any]


class Codes(NamedTuple):
    """What the codes of a page's sides are: bits of a code, of the narrower side, and whether a table has levels."""

    bits: int
    table: bool


class _Tile(NamedTuple):
    """Tokens at a time and pipeline stages: of codes, and of full-precision elements."""

    coded: tuple[int, int]
    dense: tuple[int, int]


#: Queries of a program, at most: with more, registers run out where operands of matrix instructions are held in them.
_MOST_QUERIES = {"sm90": 64, "sm100": 64, "gfx942": 16}
_MOST_QUERIES_ELSEWHERE = 32
_DEFAULT = {64: _Tile((64, 3), (64, 3)), 128: _Tile((64, 3), (64, 3)), 256: _Tile((32, 3), (32, 2))}
# Where two programs of three stages do not fit in shared memory (100 KiB; on sm100 their operands lie there too).
_SMALL = {**_DEFAULT, 128: _Tile((64, 3), (64, 2))}
_TILES = {
    "sm80": _DEFAULT,
    "sm86": _SMALL,
    "sm89": _SMALL,
    "sm90": _DEFAULT,
    "sm100": _SMALL,
    "gfx942": {64: _Tile((64, 2), (64, 2)), 128: _Tile((64, 2), (64, 2)), 256: _Tile((32, 2), (32, 2))},
    "cpu": {dim: _Tile((64, 1), (64, 1)) for dim in (64, 128, 256)},
}


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


def lanes(arch: str) -> int:
    """Threads of a warp."""
    return 64 if arch.startswith("gfx") else 32


@lru_cache(maxsize=256)
def attention_config(arch: str, dim: int, queries: int, codes: Codes | None) -> Config:
    """The configuration of the attention kernels.

    Args:
        arch: the architecture.
        dim: the larger of the key's and the value's width.
        queries: queries of a row.
        codes: those of the pages; None for full-precision elements.
    """
    amd = arch.startswith("gfx")
    tiles = _TILES.get(arch, _TILES["gfx942"] if amd else _SMALL)
    tile = tiles[64 if dim <= 64 else 128 if dim <= 128 else 256]
    block_n, stages = tile.dense if codes is None else tile.coded
    if amd and codes is not None and codes.table:
        stages = 1  # where places in a table are looked up, a second tile that waits in registers makes them spill
    most = _MOST_QUERIES.get(arch, _MOST_QUERIES_ELSEWHERE)
    block_m = min(most, max(16, triton.next_power_of_2(queries)))
    # Half the registers of a thread, where the output of a program takes more than that of matrix units of their own.
    warps = 8 if most <= 32 and block_m * dim >= 32 * 256 else 4
    if codes is not None and block_m <= 32:
        # With more, a thread's share of the tile (of 3-bit codes, of their lower two) would be less than 16 bytes.
        loads = block_n * dim * bit_planes(codes.bits)[0] // (8 * 16)
        warps = min(warps, max(1 if amd else 2, triton.next_power_of_2(loads // lanes(arch))))
    # Two waves to a SIMD need 256 registers or fewer, which the compiler exceeds if it is not told.
    return Config(block_m, block_n, warps, stages, {"waves_per_eu": 2} if amd else {})


def single_precision(config: Config, dim: int) -> Config:
    """The configuration for dot products of fp32, whose operands take twice the memory and more registers."""
    return config._replace(block_m=16, block_n=32 if dim <= 128 else 16, num_stages=1)
