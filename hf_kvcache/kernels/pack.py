"""Packing of codes into bytes and back."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.reference import pack as reference
from hf_kvcache.kernels.reference.pack import unpack_bits

__all__ = ["pack_bits", "unpack_bits"]


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 ``codes [..., D]`` (each below ``2**bits``) into ``[..., D * bits / 8]``; D is a multiple of 8."""
    if codes.is_cuda:  # on the CPU the native kernels pack in the same go as they round
        faster = implementation("pack", codes.device)
        if faster is not None:
            return faster.pack_bits(codes, bits)
    return reference.pack_bits(codes, bits)
