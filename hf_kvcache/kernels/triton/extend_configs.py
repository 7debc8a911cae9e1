"""Launch configurations of the kernel of ``extend``, by architecture and head dimension: static, without tuning."""

from __future__ import annotations

from functools import lru_cache

import torch

from hf_kvcache.kernels.triton.configs import Codes, Config, attention_config, single_precision

#: The widest head dimension whose dot products of float32 do not spill.
MOST_SINGLE_DIM = 128
#: Queries of a program, tokens at a time, warps and pipeline stages, by head dimension: without spills, with 8 warps on
#: a multiprocessor, according to the compile report.
_NVIDIA = {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)}
_TILES = {
    "sm90": {**_NVIDIA, 256: (64, 64, 8, 2)},
    "gfx942": {64: (128, 64, 8, 1), 128: (64, 64, 4, 1), 256: (64, 32, 8, 2)},
}

#: The same for codes, which are decoded as they are read.
_PAGES_ELSEWHERE = {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 3)}
_PAGES = {"sm90": {**_PAGES_ELSEWHERE, 256: (64, 64, 8, 3)}}


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


@lru_cache(maxsize=64)
def extend_pages_config(arch: str, dim: int, queries: int, dtype: torch.dtype, codes: Codes | None) -> Config | None:
    """The configuration of the kernel over pages for blocks of more queries than a decoding step has.

    Args:
        arch: the architecture.
        dim: the larger of the key's and the value's width.
        queries: queries of a row.
        dtype: of the queries.
        codes: the codes of the pages; None for full-precision elements.

    Returns:
        None where the usual one is as good.
    """
    if not arch.startswith("sm") or dtype == torch.float32 or codes is None or queries <= 64:
        return None
    tiles = _PAGES.get(arch, _PAGES_ELSEWHERE)
    return Config(*tiles[64 if dim <= 64 else 128 if dim <= 128 else 256], {})
