"""Decoding of page records in plain torch.

:func:`decode_side` decodes a side of whole records. :func:`page_scores` and :func:`page_output` apply the scales to the
queries and to the weights instead, where that is less work than applying them to every element.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from hf_kvcache.kernels.page import PageLayout, SideFormat
from hf_kvcache.kernels.reference.pack import unpack_bits
from hf_kvcache.kernels.workspace import scratch

#: Decodes one side of page records, as :func:`decode_side` does.
SideDecoder = Callable[[PageLayout, str, torch.Tensor, torch.Tensor], torch.Tensor]


def decode_side(layout: PageLayout, side: str, records: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Decode one side of page records into ``out``, in the rotated basis and without the mean.

    Args:
        layout: the layout of the records.
        side: ``"keys"`` or ``"values"``.
        records: uint8 ``[..., record_bytes]``.
        out: float32 ``[..., P, D]``, overwritten.

    Returns:
        ``out``, or for dense pages already of its dtype a view of the records.
    """
    fmt = layout.sides[side]
    codes = layout.view(records, f"{side}.codes")
    assert codes is not None
    if fmt.level == "dense":
        return codes if codes.dtype == out.dtype else out.copy_(codes)
    _decode_levels(fmt, codes, out)
    scale = layout.view(records, f"{side}.scale")
    zero = layout.view(records, f"{side}.zero")
    other = layout.view(records, f"{side}.other")
    assert scale is not None
    grouped = out.unflatten(*_grouping(fmt, out.dim()))
    expanded = _grouping(fmt, out.dim())[0] + 1
    grouped.mul_(scale.unsqueeze(expanded))
    if zero is not None:
        grouped.add_(zero.unsqueeze(expanded))
    if other is not None:
        out.mul_(other)
    return out


def page_scores(
    layout: PageLayout,
    records: torch.Tensor,
    query: torch.Tensor,
    buffer: torch.Tensor,
    decode: SideDecoder = decode_side,
) -> torch.Tensor:
    """Dot products of queries with the keys of pages.

    For few queries no scale is applied to an element. Scales per channel are multiplied with the query, scales per
    token with the scores, and a zero point is one more dot product.

    Args:
        layout: the layout of the records.
        records: uint8 ``[C, rows, record_bytes]``.
        query: float32 ``[rows, M, D]`` in the rotated basis.
        buffer: float32 ``[C, rows, P, D]``, overwritten.
        decode: decodes the keys where the scales are not folded.

    Returns:
        float32 ``[C, rows, M, P]``.
    """
    fmt = layout.sides["keys"]
    if not _folds(fmt, layout.page_size, query.shape[1]):
        return torch.matmul(query, decode(layout, "keys", records, buffer).transpose(-1, -2))
    levels, channel, token, zero = _factors(layout, "keys", records, buffer)
    scaled = query if channel is None else query * channel
    scores = torch.matmul(scaled, levels.transpose(-1, -2))
    if fmt.axis == "channel":
        if zero is not None:
            scores += torch.matmul(query, zero.transpose(-1, -2))
        return scores if token is None else scores.mul_(token)
    assert token is not None
    scores.mul_(token)
    return scores if zero is None else scores.addcmul_(scaled.sum(-1, keepdim=True), zero.transpose(-1, -2))


def page_output(
    layout: PageLayout,
    records: torch.Tensor,
    weights: torch.Tensor,
    buffer: torch.Tensor,
    decode: SideDecoder = decode_side,
) -> torch.Tensor:
    """Weighted sums of the values of each page, with the scales folded as by :func:`page_scores`.

    Args:
        layout: the layout of the records.
        records: uint8 ``[C, rows, record_bytes]``.
        weights: float32 ``[C, rows, M, P]``; may be overwritten.
        buffer: float32 ``[C, rows, P, D]``, overwritten.
        decode: decodes the values where the scales are not folded.

    Returns:
        float32 ``[C, rows, M, D]`` in the rotated basis.
    """
    fmt = layout.sides["values"]
    if not _folds(fmt, layout.page_size, weights.shape[2]):
        return torch.matmul(weights, decode(layout, "values", records, buffer))
    levels, channel, token, zero = _factors(layout, "values", records, buffer)
    if fmt.axis == "channel":
        assert channel is not None
        weights = weights if token is None else weights.mul_(token)
        output = torch.matmul(weights, levels).mul_(channel)
        return output if zero is None else output.addcmul_(weights.sum(-1, keepdim=True), zero)
    assert token is not None
    shift = None if zero is None else torch.matmul(weights, zero)
    output = torch.matmul(weights.mul_(token), levels)
    output = output if shift is None else output.add_(shift)
    return output if channel is None else output.mul_(channel)


#: Queries of a row up to which folding the scales is less work than applying them to the elements.
_MOST_FOLDED_QUERIES = 32


def _folds(fmt: SideFormat, page_size: int, queries: int) -> bool:
    whole = fmt.group == (page_size if fmt.axis == "channel" else fmt.dim)
    return fmt.level != "dense" and whole and queries <= _MOST_FOLDED_QUERIES


def _factors(
    layout: PageLayout, side: str, records: torch.Tensor, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Levels ``[..., P, D]``, scales per channel ``[..., 1, D]``, scales per token ``[..., 1, P]``, and zero points.

    Zero points are ``[..., 1, D]`` under axis "channel" and ``[..., P, 1]`` under axis "token".
    """
    fmt = layout.sides[side]
    codes = layout.view(records, f"{side}.codes")
    assert codes is not None
    _decode_levels(fmt, codes, out)
    scale, zero, other = (_float(layout.view(records, f"{side}.{name}")) for name in ("scale", "zero", "other"))
    channel, token = (scale, other) if fmt.axis == "channel" else (other, scale)
    return out, channel, None if token is None else token.transpose(-1, -2), zero


def _float(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.float()


def _grouping(fmt: SideFormat, dims: int) -> tuple[int, tuple[int, int]]:
    """The arguments of ``unflatten`` for the axis along which neighbors share a scale: (groups, members)."""
    return (dims - 2 if fmt.axis == "channel" else dims - 1), (-1, fmt.group)


def _decode_levels(fmt: SideFormat, codes: torch.Tensor, out: torch.Tensor) -> None:
    if fmt.level == "float8":
        out.copy_(codes.view(torch.float8_e4m3fn))
    elif fmt.level == "table":
        index = unpack_bits(codes, fmt.bits, scratch("codes", tuple(out.shape), torch.int32, out.device))
        torch.index_select(_table(fmt.table, out.dtype, out.device), 0, index.view(-1), out=out.view(-1))
    else:
        unpack_bits(codes, fmt.bits, out)


@lru_cache(maxsize=32)
def _table(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(levels, dtype=dtype, device=device)
