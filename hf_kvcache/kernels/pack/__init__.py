"""Packing of codes into bytes and back."""

from hf_kvcache.kernels.pack.reference import pack_bits, unpack_bits

__all__ = ["pack_bits", "unpack_bits"]
