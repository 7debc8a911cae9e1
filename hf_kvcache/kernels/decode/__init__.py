"""Attention of a few new queries over pages and full-precision tokens; :mod:`hf_kvcache.kernels.attention` calls it."""

from hf_kvcache.kernels.decode.levels import decode_side

__all__ = ["decode_side"]
