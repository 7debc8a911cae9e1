"""Launch configurations of the Triton kernels, by architecture and head dimension: static tables, without tuning."""

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
        block_n: tokens that are computed at a time.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        options: further options of the compiler.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    options: dict[str, Any]


class Codes(NamedTuple):
    """The codes of a page: bits of a code on the narrower side, and whether a side has a table of levels."""

    bits: int
    table: bool


class _Tile(NamedTuple):
    """Tokens at a time and pipeline stages, for codes and for full-precision elements.

    Codes are in pages, for which two stages are enough: see ``attention_parts.entry_of``.
    """

    coded: tuple[int, int]
    dense: tuple[int, int]


#: Architectures on which a program may have 160 KiB of shared memory. On other GPUs of NVIDIA it is 99 KiB, on AMD's
#: 64 KiB.
LARGE_SHARED = ("sm80", "sm90", "sm100")
#: Queries of a program, at most. With more, registers run out where they hold the operands of matrix instructions.
_MOST_QUERIES = {"sm90": 64, "sm100": 64, "gfx942": 16}
_MOST_QUERIES_ELSEWHERE = 32
_DEFAULT = {64: _Tile((64, 2), (64, 3)), 128: _Tile((64, 2), (64, 3)), 256: _Tile((32, 2), (32, 2))}
# For devices whose shared memory does not hold two programs of three stages (100 KiB; on sm100 operands are there too).
_SMALL = {**_DEFAULT, 128: _Tile((64, 2), (64, 2))}
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
    """The number of programs that fill a device: two for each multiprocessor."""
    if device.type == "cpu":
        return 6  # the interpreter runs one at a time, and tests should cover a few splits
    return 2 * int(torch.cuda.get_device_properties(device).multi_processor_count)


def dot_precision(arch: str) -> str:
    """The precision of dot products of fp32: three parts on the matrix units of NVIDIA, else plain fp32."""
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
        codes: the codes of the pages; None for full-precision elements.
    """
    amd = arch.startswith("gfx")
    tiles = _TILES.get(arch, _TILES["gfx942"] if amd else _SMALL)
    tile = tiles[64 if dim <= 64 else 128 if dim <= 128 else 256]
    block_n, stages = tile.dense if codes is None else tile.coded
    if amd and codes is not None and codes.table:
        stages = 1  # with look-ups in a table, a second tile waiting in registers makes them spill
    most = _MOST_QUERIES.get(arch, _MOST_QUERIES_ELSEWHERE)
    block_m = min(most, max(16 if amd or codes is None else 8, triton.next_power_of_2(queries)))
    if codes is None and not amd and block_m * dim >= 32 * 128:
        block_n = min(block_n, 32)  # with more, scores that are kept and slots that are unused would spill
    if codes is not None and not amd and block_m * dim >= 32 * 256:
        stages = 3  # the address that two stages keep in registers would make others spill
    # More warps, where the output of a program would take more than half of the registers of a thread.
    warps = 8 if block_m * dim >= min(most, 64) * 256 and block_m > 16 else 4
    if codes is not None and codes.bits == 3 and dim > 128 and most == _MOST_QUERIES_ELSEWHERE:
        warps = 8  # with fewer, both planes of a tile spill
    if codes is not None and block_m <= 32:
        # With more, a thread would load less than 16 bytes of the tile (of 3-bit codes: of their lower two bits).
        loads = block_n * dim * bit_planes(codes.bits)[0] // (8 * (16 if amd else 8))
        warps = min(warps, max(1 if amd else 4, triton.next_power_of_2(loads // lanes(arch))))
    # Two waves on a SIMD need 256 registers or fewer, which the compiler exceeds without this option.
    return Config(block_m, block_n, warps, stages, {"waves_per_eu": 2} if amd else {})


def page_stages(config: Config, codes: Codes | None) -> int:
    """Stages of a loop over pages. Full-precision elements take the configuration of tokens without pages."""
    return config.num_stages if codes is not None else min(config.num_stages, 2)


def single_precision(config: Config, dim: int) -> Config:
    """The configuration for dot products of fp32, whose operands take twice the memory and more registers."""
    return config._replace(block_m=16, block_n=32 if dim <= 128 else 16, num_stages=1)
