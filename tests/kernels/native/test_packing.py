"""``encode_side`` against the codecs in torch: the same bytes where nothing is rotated, as small an error elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from hf_kvcache.codecs import Codec, resolve
from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels import dispatch
from hf_kvcache.kernels.decode.levels import decode_side_in_torch
from hf_kvcache.kernels.hadamard.reference import rotation_matrix
from hf_kvcache.kernels.native import library
from hf_kvcache.kernels.pack import native

SIDES = ("keys", "values")
GUARD = 64
POISON = 0xAB
DIMS = (64, 72, 80, 96, 128)
PAGE_SIZES = (8, 24, 128)
ROTATED = ("unbiased", "turboquant")

#: Name, bits and options; ``group_size=-1`` stands for the largest group that pages and rows of any shape here have.
CODECS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"int{bits}": (f"int{bits}", {}) for bits in (2, 3, 4, 8)},
    **{f"int{bits} in groups": (f"int{bits}", {"group_size": -1}) for bits in (2, 3, 4, 8)},
    **{f"rotated{bits}": (f"rotated{bits}", {}) for bits in (2, 3, 4, 8)},
    **{f"rotated{bits} per token": (f"rotated{bits}", {"key_axis": "token"}) for bits in (2, 3, 4, 8)},
    **{
        f"rotated{bits} per token in groups": (f"rotated{bits}", {"key_axis": "token", "group_size": -1})
        for bits in (2, 3, 4, 8)
    },
    **{f"unbiased{bits}": (f"unbiased{bits}", {}) for bits in (1, 2, 3, 4)},
    **{f"turboquant{bits}": (f"turboquant{bits}", {}) for bits in (1, 2, 3, 4)},
    **{f"turboquant{bits} centred": (f"turboquant{bits}", {"center": True}) for bits in (1, 4)},
}
#: One of each method and axis.
SOME = ("int4", "int3 in groups", "rotated4", "rotated8 per token", "unbiased1", "unbiased4", "turboquant3 centred")


class Input(NamedTuple):
    """What one side of pages is encoded from: ``x [N, P, D]`` and ``center [N, D]`` or None."""

    x: torch.Tensor
    center: torch.Tensor | None


def make_encoder(name: str, dim: int, page_size: int, dtype: torch.dtype = torch.float32) -> PageEncoder:
    """The encoder of a codec of :data:`CODECS`."""
    spec, options = CODECS[name]
    if options.get("group_size") == -1:
        options = options | {"group_size": 16 if dim % 16 == 0 and page_size % 16 == 0 else 8}
    return PageEncoder(resolve(spec, **options), dim, dim, page_size, dtype)


def make_input(encoder: PageEncoder, side: str, pages: int, seed: int = 0) -> Input:
    """Normal vectors, each of a length of its own, with channels of sizes and means of their own."""
    fmt = encoder.layout.sides[side]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(pages, encoder.layout.page_size, fmt.dim) * (0.3 * normal(fmt.dim)).exp() + normal(fmt.dim)
    x *= (0.3 * normal(pages, encoder.layout.page_size, 1)).exp()
    return Input(x, normal(pages, fmt.dim) if fmt.centered else None)


def side_codec(codec: Codec, side: str) -> tuple[Any, str]:
    """The codec of a side, and the name by which the kernels know its method."""
    chosen = codec.keys if side == "keys" else codec.values
    assert chosen.method is not None
    return chosen, chosen.method


def encode(encoder: PageEncoder, side: str, given: Input, poison: int = POISON) -> torch.Tensor:
    """Records by the kernels, in memory that was full of ``poison``, between guards that must stay."""
    layout = encoder.layout
    method = side_codec(encoder.codec, side)[1]
    assert native.supports_encoding(layout, side, method, given.x)
    buffer = torch.full((len(given.x) * layout.record_bytes + 2 * GUARD,), poison, dtype=torch.uint8)
    records = buffer[GUARD:-GUARD].view(len(given.x), layout.record_bytes)
    native.encode_side(layout, side, method, given.x, given.center, records)
    assert (buffer[:GUARD] == poison).all() and (buffer[-GUARD:] == poison).all(), "bytes outside the records"
    return records


def encode_in_torch(encoder: PageEncoder, side: str, given: Input, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Records by the codec itself; the other side is of zeros."""
    other = torch.zeros(len(given.x), encoder.layout.page_size, encoder.layout.sides["keys"].dim)
    keys, values = (given.x, other) if side == "keys" else (other, given.x)
    with monkeypatch.context() as patch:
        patch.setenv(dispatch.VARIABLE, "reference")
        return encoder.encode(keys, values, given.center)


def of_side(encoder: PageEncoder, side: str, poison: int = POISON) -> torch.Tensor:
    """bool ``[record_bytes]``: the bytes of a side's fields."""
    mask = torch.zeros(encoder.layout.record_bytes, dtype=torch.bool)
    for name, field in encoder.layout.fields.items():
        if name.startswith(side):
            mask[field.offset : field.offset + field.nbytes] = True
    return mask


def rotated(encoder: PageEncoder, side: str, given: Input) -> torch.Tensor:
    """What is rounded, in float64."""
    fmt = encoder.layout.sides[side]
    matrix = rotation_matrix(fmt.dim, fmt.rotation, torch.float64, given.x.device)
    x = given.x.double() if matrix is None else given.x.double() @ matrix
    return x if given.center is None else x - given.center.double()[:, None]


def decoded(encoder: PageEncoder, side: str, records: torch.Tensor) -> torch.Tensor:
    """What the records hold, in the same basis, in float64."""
    shape = (len(records), encoder.layout.page_size, encoder.layout.sides[side].dim)
    return decode_side_in_torch(encoder.layout, side, records, torch.full(shape, torch.nan, dtype=torch.float64))


def squared_error(encoder: PageEncoder, side: str, given: Input, records: torch.Tensor) -> float:
    return float((decoded(encoder, side, records) - rotated(encoder, side, given)).square().mean())


def differing_codes(encoder: PageEncoder, side: str, a: torch.Tensor, b: torch.Tensor) -> float:
    """The share of the bytes of codes that are not the same."""
    codes_a, codes_b = (encoder.layout.view(records, f"{side}.codes") for records in (a, b))
    assert codes_a is not None and codes_b is not None
    return float((codes_a != codes_b).double().mean())


def instruction_sets() -> Iterator[str]:
    """Each that can be used here, in use while it is."""
    before = library.isa()
    try:
        for isa in library.available_isas():
            library.set_isa(isa)
            yield isa
    finally:
        library.set_isa(before)
