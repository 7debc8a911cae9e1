"""The kernels as operators of torch (``torch.ops.hf_kvcache.*``), so that compiled code can call them.

An operator takes only tensors and plain numbers: pages are passed as their slabs and tables, a layout as a string. The
operators rebuild the arguments and call the functions of this package, which eager code calls directly.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import lru_cache

import torch

from hf_kvcache.kernels.attention import attend as attend_kernel
from hf_kvcache.kernels.column_sums import column_sums as column_sums_kernel
from hf_kvcache.kernels.hadamard import rotate as rotate_kernel
from hf_kvcache.kernels.inputs import DenseTokens, Pages, Scoring
from hf_kvcache.kernels.latent_decode import latent_attend as latent_attend_kernel
from hf_kvcache.kernels.pack import decode_side as decode_side_kernel
from hf_kvcache.kernels.page import PageLayout, Rotation, SideFormat
from hf_kvcache.kernels.visibility import Visibility

Tensor = torch.Tensor


def layout_key(layout: PageLayout) -> str:
    """A layout as a string, for the operators' argument ``layout``."""
    sides = [asdict(layout.sides[side]) for side in ("keys", "values")]
    for side in sides:
        dtype = side["dense_dtype"]
        side["dense_dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
    return json.dumps([*sides, layout.page_size])


@lru_cache(maxsize=64)
def layout_of(key: str) -> PageLayout:
    """The layout that :func:`layout_key` wrote."""
    *sides, page_size = json.loads(key)
    formats = []
    for side in sides:
        dtype = side.pop("dense_dtype")
        table = tuple(side.pop("table"))
        formats.append(SideFormat(**side, table=table, dense_dtype=None if dtype is None else getattr(torch, dtype)))
    return PageLayout(formats[0], formats[1], page_size)


def _pages(
    slabs: list[Tensor],
    addresses: Tensor,
    counts: Tensor,
    first: Tensor,
    key_mean: Tensor | None,
    layout: str,
    heads: int,
) -> Pages | None:
    if not slabs:
        return None
    known = layout_of(layout)
    return Pages(known, slabs, addresses.numpy(), counts.numpy(), first.numpy(), {}, key_mean, heads)


@torch.library.custom_op("hf_kvcache::attend", mutates_args=())
def attend(
    query: Tensor,
    slabs: list[Tensor],
    addresses: Tensor,
    counts: Tensor,
    first: Tensor,
    key_mean: Tensor | None,
    layout: str,
    dense_keys: Tensor,
    dense_values: Tensor,
    dense_positions: Tensor | None,
    dense_unused: Tensor | None,
    start: int,
    causal: bool,
    window: int | None,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """:func:`hf_kvcache.kernels.attention.attend`; ``slabs`` may be empty. Returns output and log-sum-exp."""
    result = attend_kernel(
        query,
        _pages(slabs, addresses, counts, first, key_mean, layout, dense_keys.shape[1]),
        DenseTokens(dense_keys, dense_values, dense_positions, dense_unused),
        Visibility(start, query.shape[2], None, 0, causal, window),
        Scoring(scaling, softcap, sink_logits),
    )
    return result.output, result.log_sum_exp


@attend.register_fake
def _(query: Tensor, slabs: list[Tensor], *rest: object) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    dense_values = rest[6]
    assert isinstance(dense_values, Tensor)
    output = query.new_empty(batch, length, heads, dense_values.shape[3])
    return output, query.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.custom_op("hf_kvcache::column_sums", mutates_args=())
def column_sums(
    query: Tensor,
    log_sum_exp: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor | None,
    unused: Tensor | None,
    start: int,
    causal: bool,
    window: int | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """:func:`hf_kvcache.kernels.column_sums.column_sums` over full-precision keys: ``[B, Hq, n]``."""
    visibility = Visibility(start, query.shape[2], None, 0, causal, window)
    dense = DenseTokens(keys, values, positions, unused)
    return column_sums_kernel(query, log_sum_exp, None, dense, visibility, Scoring(scaling, softcap))[1]


@column_sums.register_fake
def _(query: Tensor, log_sum_exp: Tensor, keys: Tensor, *rest: object) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], keys.shape[2], dtype=torch.float32)


@torch.library.custom_op("hf_kvcache::latent_attend", mutates_args=())
def latent_attend(
    query: Tensor,
    slabs: list[Tensor],
    addresses: Tensor,
    counts: Tensor,
    first: Tensor,
    layout: str,
    dense_latents: Tensor,
    dense_rotary: Tensor,
    dense_positions: Tensor | None,
    dense_unused: Tensor | None,
    start: int,
    causal: bool,
    window: int | None,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """:func:`hf_kvcache.kernels.latent_decode.latent_attend`; ``slabs`` may be empty. As :func:`attend` otherwise."""
    result = latent_attend_kernel(
        query,
        _pages(slabs, addresses, counts, first, None, layout, 1),
        DenseTokens(dense_latents, dense_rotary, dense_positions, dense_unused),
        Visibility(start, query.shape[2], None, 0, causal, window),
        Scoring(scaling, softcap, sink_logits),
    )
    return result.output.contiguous(), result.log_sum_exp.contiguous()


@latent_attend.register_fake
def _(query: Tensor, slabs: list[Tensor], *rest: object) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    dense_latents = rest[4]
    assert isinstance(dense_latents, Tensor)
    output = query.new_empty(batch, length, heads, dense_latents.shape[3])
    return output, query.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.custom_op("hf_kvcache::rotate", mutates_args=())
def rotate(x: Tensor, rotation: str, inverse: bool) -> Tensor:
    """:func:`hf_kvcache.kernels.hadamard.rotate` by the rotation of that name."""
    known: dict[str, Rotation] = {"none": "none", "hadamard": "hadamard", "signed_hadamard": "signed_hadamard"}
    if rotation not in known:
        raise ValueError(f"rotation={rotation!r}; accepted: {', '.join(known)}")
    rotated = rotate_kernel(x, SideFormat(x.shape[-1], 8, rotation=known[rotation]), inverse)
    return rotated.clone() if rotated is x else rotated


@rotate.register_fake
def _(x: Tensor, rotation: str, inverse: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("hf_kvcache::decode_side", mutates_args=())
def decode_side(records: Tensor, layout: str, values: bool) -> Tensor:
    """Keys or values of page records ``[N, record_bytes]`` as float32 ``[N, P, D]``, in the rotated basis."""
    side, page_layout = "values" if values else "keys", layout_of(layout)
    out = records.new_empty(*_decoded_shape(records, page_layout, side), dtype=torch.float32)
    decoded = decode_side_kernel(page_layout, side, records, out)
    return decoded if decoded is out else out.copy_(decoded)


@decode_side.register_fake
def _(records: Tensor, layout: str, values: bool) -> Tensor:
    shape = _decoded_shape(records, layout_of(layout), "values" if values else "keys")
    return records.new_empty(*shape, dtype=torch.float32)


def _decoded_shape(records: Tensor, layout: PageLayout, side: str) -> tuple[int, int, int]:
    return records.shape[0], layout.page_size, layout.sides[side].dim
