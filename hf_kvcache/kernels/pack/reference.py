"""Bit packing in plain torch: the definition of the byte layout of codes.

A width is split into planes of 1, 2, 4 or 8 bits (3 = 2 + 1), so nothing is wasted. Inside a plane of ``w`` bits the
row is cut in ``8 / w`` equal segments; byte ``j`` holds element ``j`` of each segment, the first in the lowest bits:
all elements that leave a byte by the same shift are neighbours, which is what vector units want.
"""

from __future__ import annotations

import torch


def bit_planes(bits: int) -> list[int]:
    """The plane widths of a code of ``bits`` bits, widest (least significant) first: ``3 -> [2, 1]``."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 ``codes [..., D]`` (each below ``2**bits``) into ``[..., D * bits / 8]``; D is a multiple of 8."""
    if bits == 8:
        return codes
    packed, shift = [], 0
    for width in bit_planes(bits):
        plane = (codes >> shift) & ((1 << width) - 1)
        segments = plane.chunk(8 // width, dim=-1)
        byte = segments[0].clone()
        for i, segment in enumerate(segments[1:], 1):
            byte |= segment << (i * width)
        packed.append(byte)
        shift += width
    return torch.cat(packed, dim=-1)


def unpack_bits(packed: torch.Tensor, bits: int, out: torch.Tensor) -> torch.Tensor:
    """Unpack uint8 ``packed [..., D * bits / 8]`` into ``out [..., D]`` of any numeric dtype, which is returned."""
    if bits == 8:
        return out.copy_(packed)
    dim, start, shift = out.shape[-1], 0, 0
    for width in bit_planes(bits):
        count, mask = 8 // width, (1 << width) - 1
        length = dim // count
        plane = packed[..., start : start + length]
        for i in range(count):
            segment = out[..., i * length : (i + 1) * length]
            codes = plane >> (i * width) if i == count - 1 else (plane >> (i * width)) & mask
            if shift:
                segment.add_(codes, alpha=1 << shift)
            else:
                segment.copy_(codes)
        start, shift = start + length, shift + width
    return out
