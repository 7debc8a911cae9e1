"""Bit packing in plain torch: the definition of the byte layout of codes.

A width is split into planes of 1, 2, 4 or 8 bits (3 = 2 + 1), so that no bit is wasted. In a plane of ``w`` bits a row
is cut into ``8 / w`` equal segments, and byte ``j`` holds element ``j`` of each segment, the first one in the lowest
bits. So all elements that one shift extracts from the bytes are neighbors, as vector instructions need them.
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
    start = shift = 0
    for width in bit_planes(bits):
        length = out.shape[-1] * width // 8
        plane = packed[..., start : start + length]
        if shift:
            out.add_(_unpack_lanes(plane, width), alpha=1 << shift)
        elif width == 1:
            out.copy_(_unpack_lanes(plane, width))
        else:
            _unpack_segments(plane, width, out)
        start, shift = start + length, shift + width
    return out


def _unpack_segments(plane: torch.Tensor, width: int, out: torch.Tensor) -> None:
    """Unpack a plane segment by segment, which is fastest for few and long segments."""
    last = 8 // width - 1
    for i, segment in enumerate(out.chunk(last + 1, dim=-1)):
        codes = plane >> (i * width) if i else plane
        segment.copy_(codes if i == last else codes & ((1 << width) - 1))


def _unpack_lanes(plane: torch.Tensor, width: int) -> torch.Tensor:
    """The codes of a plane as uint8 ``[..., D]``, up to eight bytes at a time, which is fastest for short segments."""
    lanes = plane.view(_lane_type(plane)).unsqueeze(-2)
    # One shift for each segment. The mask removes the bits that come from the byte above.
    shifts = torch.arange(0, 8, width, dtype=lanes.dtype, device=lanes.device).unsqueeze(-1)
    mask = int.from_bytes(bytes([(1 << width) - 1]) * lanes.dtype.itemsize, "little")
    return torch.bitwise_right_shift(lanes, shifts).bitwise_and_(mask).view(torch.uint8).flatten(-2)


def _lane_type(plane: torch.Tensor) -> torch.dtype:
    """The widest integer type as which the rows of bytes can be read."""
    places = (plane.shape[-1], plane.storage_offset(), *plane.stride()[:-1])
    for lane in (torch.int64, torch.int32, torch.int16):
        if all(place % lane.itemsize == 0 for place in places):
            return lane
    return torch.uint8
