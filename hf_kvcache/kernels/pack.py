"""Packing of codes into bytes, and decoding of page records, by the backend of their device."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.page import PageLayout
from hf_kvcache.kernels.reference import levels
from hf_kvcache.kernels.reference import pack as reference

__all__ = ["decode_side", "pack_bits"]


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 ``codes [..., D]`` (each below ``2**bits``) into ``[..., D * bits / 8]``; D is a multiple of 8."""
    if codes.is_cuda:  # the CPU kernels round and pack in one call, :func:`encode_side`
        faster = implementation("pack", codes.device)
        if faster is not None:
            return faster.pack_bits(codes, bits)
    return reference.pack_bits(codes, bits)


def decode_side(layout: PageLayout, side: str, records: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Decode one side of page records; see :func:`hf_kvcache.kernels.reference.levels.decode_side`."""
    if layout.sides[side].level != "dense":
        faster = implementation("pack", records.device)
        if faster is not None and faster.supports_decoding(layout, records, out):
            return faster.decode_side(layout, side, records, out)
    return levels.decode_side(layout, side, records, out)
