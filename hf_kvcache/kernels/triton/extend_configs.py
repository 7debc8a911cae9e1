"""Launch configurations of the kernel of ``extend``, by architecture and head dimension: static, without tuning."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton.language as tl

from hf_kvcache.kernels.page import PageLayout
from hf_kvcache.kernels.triton.configs import Config, attention_config, dot_precision, single_precision
from hf_kvcache.kernels.triton.sides import describe_side

#: The widest head dimension whose dot products of float32 do not spill.
MOST_SINGLE_DIM = 128
#: Queries of a program, tokens at a time, warps and pipeline stages, by head dimension: without spills, with 8 warps on
#: a multiprocessor, according to the compile report.
_NVIDIA = {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)}
_TILES = {
    "sm90": {**_NVIDIA, 256: (64, 64, 8, 2)},
    "gfx942": {64: (128, 64, 8, 1), 128: (64, 64, 4, 1), 256: (64, 32, 8, 2)},
}

#: The same for codes that are decoded as they are read, by assembly. On other GPUs registers spill. With two stages of
#: width 128 they would spill too, for want of the two that hold an address.
_PAGES = {"sm90": {64: (128, 128, 8, 2), 128: (128, 128, 8, 3), 256: (64, 64, 8, 2)}}
_PAGES["sm100"] = _PAGES["sm90"]
#: Queries of a row from which on they fill such blocks.
_LEAST_QUERIES = 65


@lru_cache(maxsize=64)
def extend_config(arch: str, dim: int, queries: int, dtype: torch.dtype) -> Config:
    """The configuration for dot products of ``dtype``.

    Args:
        arch: the architecture.
        dim: the larger of the key's and the value's width.
        queries: queries of a row.
        dtype: of the keys and values in dot products.
    """
    config = attention_config(arch, dim, queries, None)
    if arch == "cpu":
        return config
    if dtype == torch.float32:
        return single_precision(config, dim)
    tiles = _TILES["gfx942"] if arch.startswith("gfx") else _TILES.get(arch, _NVIDIA)
    block_m, block_n, warps, stages = tiles[64 if dim <= 64 else 128 if dim <= 128 else 256]
    return Config(block_m, block_n, warps, stages, config.options)


def extend_pages_config(
    layout: PageLayout, arch: str, queries: int, dtype: torch.dtype, masked: bool = False
) -> Config | None:
    """The configuration of a kernel that decodes pages as it reads them, for more queries than a decoding step has.

    Args:
        layout: of the pages.
        arch: the architecture.
        queries: queries of a row.
        dtype: of the queries.
        masked: whether some tokens of pages are hidden or missing, or scores are capped. That takes registers.

    Returns:
        None where there is none: the usual one is for fewer queries, and decoding first may be better.
    """
    if arch not in _PAGES or dtype == torch.float32 or queries < _LEAST_QUERIES:
        return None
    sides = [describe_side(layout, name, tl.float16, False, dot_precision(arch)) for name in layout.sides]
    if not all(side.scaling for side in sides):
        return None
    dim = max(side.dim for side in sides)
    block_m, block_n, warps, stages = _PAGES[arch][64 if dim <= 64 else 128 if dim <= 128 else 256]
    return Config(block_m, min(block_n, 64) if masked else block_n, warps, stages, {})
