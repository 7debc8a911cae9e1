"""Packing in one launch: a Triton kernel that rotates, rounds and packs keys and values straight into page records.

A program makes some tokens of one side of one record. Vectors are read where the model or the buffer of full-precision
tokens has them, and bytes are written where the record lies: nothing is copied, cut or put together around the launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from hf_kvcache.kernels.page import PageLayout, SideFormat
from hf_kvcache.kernels.static_state import StaticState
from hf_kvcache.kernels.triton import encode_cases
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.configs import LARGE_SHARED, lanes
from hf_kvcache.kernels.triton.configs import architecture as architecture_of
from hf_kvcache.kernels.triton.device import on_their_device
from hf_kvcache.kernels.triton.encode_methods import (
    evened,
    float8,
    integers_by_channel,
    integers_by_group,
    integers_by_token,
    norms,
    unbiased_keys,
    unbiased_values,
)
from hf_kvcache.kernels.triton.encode_side import (
    LEAST,
    MOST_ELEMENTS,
    WHOLE_PAGES,
    EncodedSide,
    describe,
    load_rotated,
    operand_of,
    rotation_by_places,
    segments_of,
    store_codes,
    store_padding,
)
from hf_kvcache.kernels.triton.encode_side import places as channels_of
from hf_kvcache.kernels.triton.key_mean import EVENTS, key_mean, supports_mean
from hf_kvcache.kernels.triton.key_mean import compile_cases as mean_cases
from hf_kvcache.kernels.triton.prepared_launch import PreparedLaunch

__all__ = ["compile_cases", "due_launch", "encode_pages", "key_mean", "supports_encoding", "supports_mean"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Elements of a program's tile that a thread holds.
_PER_THREAD = 32
_MOST_WARPS = 16
#: Elements of a tile that 64 KiB of shared memory hold, in 32 bits each.
MOST_SHARED = (64 << 10) // 4


def supports_encoding(
    layout: PageLayout, methods: tuple[str | None, str | None], keys: torch.Tensor, values: torch.Tensor
) -> bool:
    """Whether :func:`encode_pages` can encode such pages."""
    arch = architecture_of(keys.device)
    return all(
        _supports_side(layout.sides[side], layout.page_size, method, x.dtype, arch)
        for side, method, x in zip(layout.sides, methods, (keys, values), strict=True)
    )


@on_their_device
def encode_pages(
    layout: PageLayout,
    methods: tuple[str | None, str | None],
    keys: torch.Tensor,
    values: torch.Tensor,
    key_mean: torch.Tensor | None,
    key_scale: torch.Tensor | None,
    records: torch.Tensor,
) -> None:
    """Encode whole pages of keys and values, in one launch.

    Args:
        layout: the layout of the records.
        methods: names of the encodings of keys and of values.
        keys: ``[b, heads, n * P, Dk]`` in the model's basis; only the last dimension must be contiguous.
        values: ``[b, heads, n * P, Dv]``, as the keys.
        key_mean: fp32 ``[b * heads, Dk]``, what to subtract from the rotated keys; or None.
        key_scale: fp32 ``[b * heads, Dk]``, powers of two by which to divide the keys before the rotation; or None.
        records: where the bytes go, page by page and for each page row by row: the records themselves, uint8
            ``[n * b * heads, record_bytes]``, or their addresses, int64 ``[n * b * heads]``. All bytes are written.
    """
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    rows, count = keys.shape[0] * keys.shape[1], keys.shape[2] // layout.page_size
    if rows * count == 0:
        return
    assert records.stride(-1) == 1 and len(records) == rows * count
    launch = _Launch(layout, methods, keys, values)
    arguments = launch.arguments | {
        "key_mean": None if key_mean is None else key_mean.contiguous(),
        "key_scale": None if key_scale is None else key_scale.contiguous(),
        "records": records,
        "places": None,
        "stride": records.stride(0),
        "count": rows * count,
        "capacity": 0,
        "ADDRESSES": records.dtype == torch.int64,
        "EVENTS": 0,
    }
    _encode_kernel[(rows * count * launch.blocks,)](events=None, **arguments, **launch.options)


def due_launch(held: StaticState) -> PreparedLaunch:
    """A launch that encodes the pages that are due of a static state, told by ``events`` int64 ``[B, EVENTS]``."""
    start, page_size = held.sink_length, held.layout.page_size
    keys, values = (x[:, :, start : start + page_size] for x in (held.dense_keys, held.dense_values))
    launch, rows = _Launch(held.layout, held.methods, keys, values), keys.shape[0] * keys.shape[1]
    arguments = launch.arguments | {
        "key_mean": held.key_mean,
        "key_scale": held.key_scale,
        "records": held.records,
        "places": held.places,
        "stride": held.records.stride(0),
        "count": rows,
        "capacity": held.places.shape[1],
        "ADDRESSES": False,
        "EVENTS": EVENTS,
    }
    return PreparedLaunch(_encode_kernel, (rows * launch.blocks, 1), arguments, launch.options)


class _Launch:
    """What a launch of the kernel takes whatever becomes of the pages.

    Args:
        layout: see :func:`encode_pages`, like the others.
        methods: as there.
        keys: as there.
        values: as there.

    Attributes:
        arguments: the arguments about keys, values and their rotations.
        blocks: programs of a record.
        options: options of the compiler.
    """

    def __init__(
        self, layout: PageLayout, methods: tuple[str | None, str | None], keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        arch = architecture_of(keys.device)
        sides: list[EncodedSide | None] = []
        self.arguments: dict[str, Any] = {"rows": keys.shape[0] * keys.shape[1], "heads": keys.shape[1]}
        for name, method, x in zip(layout.sides, methods, (keys, values), strict=True):
            fmt = layout.sides[name]
            side = None if fmt.dim == 0 else describe(layout, name, str(method), x.dtype, arch)
            signs, factors = [None, None] if side is None else _rotation(side, fmt, x, arch)
            self.arguments |= {name: x, f"{name[:-1]}_signs": signs, f"{name[:-1]}_factors": factors}
            self.arguments |= dict(
                zip((f"{name}_{a}" for a in ("sequence", "head", "token")), x.stride(), strict=False)
            )
            self.arguments[name.upper()] = side
            sides.append(side)
        self.blocks = sum(side.blocks for side in sides if side is not None)
        self.options = {"num_warps": _warps(sides, arch), "num_stages": _stages(arch)}


def _supports_side(fmt: SideFormat, page_size: int, method: str | None, dtype: torch.dtype, arch: str) -> bool:
    if fmt.dim == 0:
        return True
    if dtype not in _DTYPES or method not in _KNOWN or not _KNOWN[method](fmt, page_size):
        return False
    if fmt.level == "dense" or (fmt.axis == "token" and method not in WHOLE_PAGES):
        tokens = LEAST
    else:
        tokens = page_size if method in WHOLE_PAGES else fmt.group
    tile = triton.next_power_of_2(max(tokens, LEAST)) * triton.next_power_of_2(max(fmt.dim, LEAST))
    # Codes that are packed in another order than numbers are computed go through shared memory, all of a tile at once.
    shared = fmt.bits < 8 and (method == "unbiased_keys" or fmt.rotation == "none")
    most = MOST_SHARED if shared and arch != "cpu" and arch not in LARGE_SHARED else MOST_ELEMENTS
    return bool(tile <= most and (fmt.bits >= 8 or fmt.dim % 8 == 0))


def _is_whole(fmt: SideFormat, page_size: int) -> bool:
    """Whether a whole page or row shares a scale."""
    return fmt.group == (page_size if fmt.axis == "channel" else fmt.dim)


def _is_integer(fmt: SideFormat, page_size: int) -> bool:
    if fmt.level != "integer" or not fmt.zero or fmt.other:
        return False
    # Groups of channels must be rows of a tile: powers of two that lie in a segment.
    in_segments = fmt.group & (fmt.group - 1) == 0 and fmt.dim // segments_of(fmt.bits) % fmt.group == 0
    return fmt.axis == "channel" or _is_whole(fmt, page_size) or in_segments


def _has_levels(fmt: SideFormat, page_size: int, keys: bool) -> bool:
    """Whether a side has the fields of its method, and a table in which a level can be looked up by its magnitude."""
    symmetric = all(abs(a + b) < 1e-6 for a, b in zip(fmt.table, reversed(fmt.table), strict=True))
    fields = (fmt.axis, fmt.zero, fmt.other) == (("channel", True, True) if keys else ("token", False, False))
    return fmt.level == "table" and fmt.bits <= 4 and symmetric and fields and _is_whole(fmt, page_size)


#: Whether the kernel knows a format, by the method of its encoding.
_KNOWN: dict[str | None, Callable[[SideFormat, int], bool]] = {
    "dense": lambda fmt, page_size: fmt.level == "dense" and fmt.dense_dtype in _DTYPES,
    "float8": lambda fmt, page_size: fmt.level == "float8" and fmt.axis == "token" and _is_whole(fmt, page_size),
    "integer": _is_integer,
    "kvarn": lambda fmt, page_size: fmt.level == "integer" and fmt.other and fmt.zero and _is_whole(fmt, page_size),
    "norm": lambda fmt, page_size: _has_levels(fmt, page_size, keys=False),
    "unbiased_keys": lambda fmt, page_size: _has_levels(fmt, page_size, keys=True),
    "unbiased_values": lambda fmt, page_size: _has_levels(fmt, page_size, keys=False),
}


def _rotation(side: EncodedSide, fmt: SideFormat, x: torch.Tensor, arch: str) -> list[torch.Tensor | None]:
    """Signs and factors of a side's rotation; Nones if there is none."""
    if not side.rotated:
        return [None, None]
    return list(
        rotation_by_places(side.dim, side.dim_pad, side.bits, fmt.rotation, operand_of(x.dtype, arch), x.device)
    )


def _warps(sides: list[EncodedSide | None], arch: str) -> int:
    """Warps of a program."""
    most = max(side.block * side.dim_pad for side in sides if side is not None)
    return max(1, min(_MOST_WARPS, most // (_PER_THREAD * lanes(arch))))


def _stages(arch: str) -> int:
    """Steps of the rotation, where it takes several, whose loads overlap."""
    return 1 if arch.startswith("gfx") else 2


@triton.jit(do_not_specialize=["count", "rows", "heads", "capacity"])
def _encode_kernel(
    events,
    keys,
    values,
    keys_sequence,
    keys_head,
    keys_token,
    values_sequence,
    values_head,
    values_token,
    key_signs,
    key_factors,
    value_signs,
    value_factors,
    key_mean,
    key_scale,
    records,
    places,
    stride,
    count,
    rows,
    heads,
    capacity,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    ADDRESSES: tl.constexpr,
    EVENTS: tl.constexpr,
):
    """Encode pages; grid (tokens of sides of records). Programs of the keys, which take longest, come first.

    With ``EVENTS``, there is one page a row, which is encoded if the row's sequence has one that is due.

    Args:
        events: int64 ``[b, EVENTS]``; the second number of a sequence is the column of the page that is due, or -1.
            None without ``EVENTS``.
        keys: ``[b, heads, n * P, Dk]``, with strides ``keys_sequence``, ``keys_head`` and ``keys_token``.
        values: ``[b, heads, n * P, Dv]``, the same.
        key_signs: the rotation of the keys from :func:`rotation_by_places`; None without one.
        key_factors: its factors.
        value_signs: the rotation of the values.
        value_factors: its factors.
        key_mean: fp32 ``[rows, Dk]``; None unless a mean is subtracted.
        key_scale: fp32 ``[rows, Dk]``; None unless keys are divided by a scale.
        records: uint8, records ``stride`` bytes apart; with ``ADDRESSES``, int64 addresses of the records.
        places: int64 ``[rows, capacity]``, which record each column of a row has; None without ``EVENTS``.
        count: number of records.
        rows: ``b * heads``.
        heads: heads of a sequence.
        capacity: columns of ``places``.
        KEYS: description of the keys; None if they have no channels.
        VALUES: the same for values.
    """
    program = tl.program_id(0).to(tl.int64)
    of_keys = count * 0
    if KEYS is not None:
        of_keys = count * KEYS.blocks
        if program < of_keys:
            _encode_side(
                keys,
                keys_sequence,
                keys_head,
                keys_token,
                key_signs,
                key_factors,
                key_mean,
                key_scale,
                records,
                stride,
                program,
                rows,
                heads,
                events,
                places,
                capacity,
                KEYS,
                ADDRESSES,
                EVENTS,
            )
    if VALUES is not None:  # noqa: SIM102 (this one is decided by the compiler)
        if program >= of_keys:
            _encode_side(
                values,
                values_sequence,
                values_head,
                values_token,
                value_signs,
                value_factors,
                key_mean,
                None,
                records,
                stride,
                program - of_keys,
                rows,
                heads,
                events,
                places,
                capacity,
                VALUES,
                ADDRESSES,
                EVENTS,
            )


@triton.jit
def _encode_side(
    source,
    sequence_stride,
    head_stride,
    token_stride,
    signs,
    factors,
    key_mean,
    key_scale,
    records,
    stride,
    program,
    rows,
    heads,
    events,
    places,
    capacity,
    side: tl.constexpr,
    ADDRESSES: tl.constexpr,
    EVENTS: tl.constexpr,
):
    """Encode ``side.tokens`` tokens of a side: those of number ``program``, record by record."""
    index, block = program // side.blocks, (program % side.blocks).to(tl.int32)
    column, row = index // rows, index % rows
    source += row // heads * sequence_stride + row % heads * head_stride + column * side.page * token_stride
    mean = key_mean
    if side.centered:
        mean += row * side.dim
    scale = key_scale
    if key_scale is not None:
        scale += row * side.dim
    if EVENTS > 0:
        due = tl.load(events + row // heads * EVENTS + 1)
        if due >= 0:
            record = records + tl.load(places + row * capacity + due) * stride
            _encode_block(source, token_stride, signs, factors, mean, scale, record, block, side)
    else:
        if ADDRESSES:
            record = tl.load(records + index).to(tl.pointer_type(tl.uint8))
        else:
            record = records + index * stride
        _encode_block(source, token_stride, signs, factors, mean, scale, record, block, side)


@triton.jit
def _encode_block(source, token_stride, signs, factors, mean, scale, record, block, side: tl.constexpr):
    """Encode block ``block`` of a page's tokens, which begin at ``source``, into ``record``."""
    record = tl.multiple_of(record, 16)
    i = tl.arange(0, side.block)
    token = block * side.tokens + i
    real = (i < side.tokens) & (token < side.page)
    _, there = channels_of(side)
    x = load_rotated(source, token_stride, token, real, signs, factors, mean, scale, side)
    if side.method == "dense":
        channel = tl.arange(0, side.dim_pad)
        target = (record + side.codes_at).to(tl.pointer_type(side.element)) + token[:, None] * side.dim
        tl.store(target + channel[None, :], x.to(side.element), mask=real[:, None] & there[None, :])
    else:
        store_codes(record, _codes(x, record, block, token, real, there, side), token, real, side)
    if block == 0:
        store_padding(record, side)


@triton.jit
def _codes(x, record, block, token, real, there, side: tl.constexpr):
    """The codes of a tile, whose scales are stored."""
    if side.method == "unbiased_keys":
        return unbiased_keys(x, record, token, real, there, side)
    elif side.method == "unbiased_values":
        return unbiased_values(x, record, token, real, there, side)
    elif side.method == "norm":
        return norms(x, record, token, real, there, side)
    elif side.method == "kvarn":
        return evened(x, record, token, real, there, side)
    elif side.method == "float8":
        return float8(x, record, token, real, side)
    elif side.channel:
        return integers_by_channel(x, record, block, real, there, side)
    elif side.group == side.dim:
        return integers_by_token(x, record, token, real, there, side)
    else:
        return integers_by_group(x, record, token, real, side)


def compile_cases(architecture: str) -> list[CompileCase]:
    """Specializations for the compile report: of the defaults, of other codecs, and of the key mean."""
    cases = [_case(architecture, *case) for case in encode_cases.CASES]
    due = [_case(architecture, codec, 128, 128, torch.bfloat16, due=True) for codec in ("unbiased4", "rotated8")]
    return [*cases, *due, *mean_cases(architecture)]


def _case(arch: str, codec: str, key_dim: int, value_dim: int, dtype: torch.dtype, due: bool = False) -> CompileCase:
    keys, values = encode_cases.described(codec, (key_dim, value_dim), dtype, arch)
    signature, constants = encode_cases.arguments(keys, values, dtype, due)
    return CompileCase(
        name=f"encode {codec} {signature['keys'][1:]} D={key_dim}{' where due' if due else ''}",
        kernel=_encode_kernel,
        signature=signature,
        constants=constants,
        num_warps=_warps([keys, values], arch),
        num_stages=_stages(arch),
        aligned=encode_cases.aligned(signature),
        tensor_cores=keys.rotated,
        waived=encode_cases.waived(codec, key_dim, arch),
    )
