"""Encoding of pages, packing of codes into bytes, and decoding of records, by the backend of their device."""

from __future__ import annotations

import torch

from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.page import PageLayout, SideFormat
from hf_kvcache.kernels.reference import levels
from hf_kvcache.kernels.reference import pack as reference

__all__ = ["can_encode_pages", "decode_side", "encode_pages", "pack_bits", "write_key_basis", "write_key_mean"]

#: Names of the encodings of keys and of values; None for one that no kernel has.
Methods = tuple[str | None, str | None]


def can_encode_pages(layout: PageLayout, methods: Methods, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether :func:`encode_pages` can encode such keys and values ``[b, heads, n * P, D]``."""
    faster = implementation("encode", keys.device)
    return faster is not None and faster.supports_encoding(layout, methods, keys, values)


def encode_pages(
    layout: PageLayout,
    methods: Methods,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_mean: torch.Tensor | None,
    key_scale: torch.Tensor | None,
    records: torch.Tensor,
) -> None:
    """Encode whole pages in one launch or call; see :func:`hf_kvcache.kernels.triton.encode.encode_pages`."""
    faster = implementation("encode", keys.device)
    assert faster is not None
    faster.encode_pages(layout, methods, keys, values, key_mean, key_scale, records)


def write_key_mean(fmt: SideFormat, keys: torch.Tensor, key_scale: torch.Tensor | None, mean: torch.Tensor) -> bool:
    """Write the rotated mean of ``keys [b, heads, n, D]`` over tokens into ``mean [b, heads, D]``, if a kernel can.

    Args:
        fmt: the format of the keys.
        keys: in the model's basis.
        key_scale: float32 ``[b, heads, D]``, by what they are divided before the rotation; or None.
        mean: is written.

    Returns:
        Whether it was written.
    """
    faster = implementation("encode", keys.device)
    if key_scale is not None and not key_scale.is_contiguous():
        return False
    if faster is None or not mean.is_contiguous() or not faster.supports_mean(fmt, keys):
        return False
    faster.key_mean(fmt, keys, key_scale, mean)
    return True


def write_key_basis(
    fmt: SideFormat, query: torch.Tensor, keys: torch.Tensor, first: int, packed: torch.Tensor, mean: torch.Tensor
) -> torch.Tensor | None:
    """The scale of the keys of a prompt, and the mean of those that are packed, together, if a kernel can.

    Args:
        fmt: the format of the keys.
        query: ``[b, Hq, T, D]`` in the model's basis, of all tokens.
        keys: ``[b, heads, T, D]``, likewise.
        first: the first token that counts for the scale.
        packed: ``[b, heads, n, D]``, the keys that are packed.
        mean: float32 ``[b, heads, D]``, is written: their rotated mean.

    Returns:
        The scale, float32 ``[b, heads, D]``, contiguous; None if no kernel can, and nothing is written then.
    """
    faster = implementation("key_basis", keys.device)
    if faster is None or not mean.is_contiguous() or not faster.supports(fmt, query, keys, first, packed):
        return None
    return faster.key_basis(query, keys, first, packed, fmt, mean)


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 ``codes [..., D]`` (each below ``2**bits``) into ``[..., D * bits / 8]``; D is a multiple of 8."""
    if codes.is_cuda:  # the CPU kernels round and pack in one call, :func:`encode_pages`
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
